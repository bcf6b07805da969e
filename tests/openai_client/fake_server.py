"""An HTTP server on loopback that answers chat requests as a test says."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, finish_reason="stop", **message):
    choice = {"message": {"role": "assistant", "content": text} | message}
    return {"choices": [choice | {"finish_reason": finish_reason}]}


def echo(body):
    """Answer with the last message."""
    return completion("You wrote: " + body["messages"][-1]["content"])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 20  # head and body in one packet; else the kernel waits 40 ms for the second
    server: "FakeServer"

    def do_GET(self):
        self.server.paths.append(self.path)
        self.server.headers_seen.append(dict(self.headers))
        self.send(self.server.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.paths.append(self.path)
            self.server.headers_seen.append(dict(self.headers))
            self.server.bodies.append(body)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
            answer = self.server.script.pop(0) if self.server.script else self.server.answer
        try:
            self.send(answer(body) if callable(answer) else answer)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def send(self, answer):
        """Send an object as JSON, bytes as they are, or (status, headers, content).

        Content that is an iterator is sent in parts, and never ends as far as the client knows.
        """
        if answer is None:  # the server dies: the connection ends without a reply
            self.close_connection = True
            return
        status, headers, content = answer if isinstance(answer, tuple) else (200, {}, answer)
        if isinstance(content, Iterator):
            size, parts = 1 << 30, content
        else:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            size, parts = len(data), [data]
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            for part in parts:
                self.wfile.write(part)
                self.wfile.flush()
        except ConnectionError:
            self.close_connection = True  # the client has given up

    def log_message(self, *_):
        pass


class FakeServer(ThreadingHTTPServer):
    """A server with what it has received: `bodies`, `paths` and `headers_seen` of the requests."""

    daemon_threads = True

    def __init__(self, answer, script, models, port):
        super().__init__(("127.0.0.1", port), Handler)
        self.port = self.server_address[1]
        self.answer, self.script = answer, list(script)
        self.models = {"data": [{"id": name} for name in models]}
        self.bodies, self.paths, self.headers_seen = [], [], []
        self.lock, self.at_once, self.most_at_once = threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.port}/v1"


@contextmanager
def fake_server(answer=echo, *, script=(), models=("m",), port=0):
    """Yield a running server. `script` answers the first requests, `answer` all others."""
    with FakeServer(answer, script, models, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
