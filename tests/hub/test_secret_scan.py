"""Secrets and personal paths are found by file and line; ordinary text has no matches."""

import gzip

import mlx.core as mx
import pytest

from mlx_dpo.errors import ConfigError
from mlx_dpo.hub.push import check_secrets
from mlx_dpo.hub.secret_scan import scan_for_secrets
from mlx_dpo.io.arrays import write_arrays

TAIL = "A1b2C3d4" * 5
PLANTED = {
    "hf_" + TAIL: "a Hugging Face token",
    "sk-" + "proj-" + TAIL: "an OpenAI, Anthropic or DeepSeek key",
    "gsk_" + TAIL: "a model provider's key",
    "ghp_" + TAIL: "a GitHub token",
    "github_pat_" + TAIL: "a GitHub token",
    "glpat-" + TAIL: "a GitLab token",
    "AKIA" + "ABCDEFGH12345678": "an AWS key",
    "AIza" + TAIL[:35]: "a Google key",
    "GOCSPX-" + TAIL: "a Google key",
    "xoxb-" + "1234567890-abc": "a Slack token",
    "https://hooks.slack." + "com/services/T01/B02/x3": "a Slack token",
    "sk_live_" + TAIL: "a Stripe key",
    "npm_" + TAIL[:36]: "a token of a package registry",
    "pypi-AgEI" + TAIL: "a token of a package registry",
    "dapi" + "0123456789abcdef" * 2: "a token of a cloud service",
    "SG." + TAIL[:22] + "." + (TAIL + TAIL)[:43]: "a token of a cloud service",
    "123456789:AA" + TAIL[:33]: "a Telegram token",
    "AZURE_OPENAI_KEY=" + TAIL: "a password or key",
    "client_secret = " + "correct-horse": "a password or key",
    "my_hf_" + TAIL: "a Hugging Face token",
    "WANDB_API_KEY=" + "0123456789" * 4: "a W&B key",
    "-----BEGIN RSA PRIVATE " + "KEY-----": "a private key",
    "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0In0.x": "a JSON web token",
    "https://someone:" + "word@example.org/x": "a password in a URL",
    "redis://:" + "word@example.org/x": "a password in a URL",
    '"api_key": ' + '"0123456789abc"': "a password or key",
    "AWS_SECRET_ACCESS_KEY=" + TAIL: "a password or key",
    "DB_PASSWORD: " + "correct-horse": "a password or key",
    "Authorization: Bearer " + TAIL: "a password or key",
    "-----BEGIN PGP PRIVATE " + "KEY BLOCK-----": "a private key",
    "/home/" + "someone/pairs.jsonl": "a personal path",
    "/Users/" + "someone/pairs.jsonl": "a personal path",
    "C:\\Users\\" + "someone": "a personal path",
    "%2Fhome%2F" + "someone%2Fx": "a personal path",
    "\\/home\\/" + "someone": "a personal path",
    "/var/folders/" + "x1/y": "a personal path",
    "/root/" + "data": "a personal path",
    "file:///" + "data": "a personal path",
}


@pytest.mark.parametrize(("text", "kind"), PLANTED.items(), ids=range(len(PLANTED)))
@pytest.mark.parametrize("around", ["{}", '"x": "{}",', "see {}", "\ufeff{}\n", '"a\\n{}\\t"'])
def test_a_secret_is_found_with_its_line(tmp_path, text, kind, around):
    file = tmp_path / "README.md"
    content = "one\ntwo\n" + around.format(text)
    file.write_text(content, encoding="utf-8")
    assert list(scan_for_secrets(content.encode(), "README.md")) == list(
        scan_for_secrets(file, "README.md")
    )
    assert ("README.md:3", kind) in [
        (match.location, match.kind) for match in scan_for_secrets(file, "README.md")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/org/name and http://example.org:80/a@b",
        "the home/folder of /homework, a secret: none, tokens: 1234567890",
        "task-oriented, risk-" + "a" * 10 + ", hf_hub_download and `hf auth login`",
        '{"num_tokens": 5153, "padding_share": 0.0, "password": ""}',
        "The secret: patience. My secret is butterflies; her passwords were many",
        "api_key=os.environ['KEY'] api_key='YOUR_API_KEY' password=<password> API_KEY=$KEY",
        "cd /home/user/project; ls /Users/username/Desktop; the /home/ folder",
        "mlx-dpo pull org/name --output adapter; hf download org/name --local-dir adapter",
        "sha256 " + "0123456789abcdef" * 4,
    ],
)
def test_ordinary_text_has_no_matches(tmp_path, text):
    (tmp_path / "x").write_text(text)
    assert list(scan_for_secrets(tmp_path / "x", "x")) == []


def test_the_header_of_a_safetensors_file_is_scanned_and_its_numbers_are_not(tmp_path):
    path = tmp_path / "x.safetensors"
    token = ("hf_" + TAIL).encode()
    write_arrays(path, {"a": mx.array(list(token), mx.uint8)}, {"made": "here"})
    assert token in path.read_bytes()
    assert list(scan_for_secrets(path, path.name)) == []
    write_arrays(path, {"a": mx.zeros((2,))}, {"made": "/home/" + "someone/run"})
    assert [match.kind for match in scan_for_secrets(path, path.name)] == ["a personal path"]


def png(metadata):
    """Return a PNG of one pixel, written by Pillow with the given metadata."""
    from io import BytesIO

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    texts, file = PngInfo(), BytesIO()
    for kind, text in metadata.items() - {("eXIf", metadata.get("eXIf"))}:
        if kind == "iTXt":
            texts.add_itxt("about", text, zip=True)
        else:
            texts.add_text("about", text, zip=kind == "zTXt")
    exif = Image.Exif()
    exif[0x013B] = metadata.get("eXIf", "")  # artist
    Image.new("RGB", (1, 1)).save(file, "PNG", pnginfo=texts, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "eXIf"])
def test_the_metadata_of_a_png_are_scanned(kind):
    secret = "hf_" + TAIL
    assert list(scan_for_secrets(png({kind: "nothing"}), "curves.png")) == []
    image = png({kind: secret})
    assert kind.encode() in image
    assert (secret.encode() in image) == (kind in ("tEXt", "eXIf"))
    [match] = scan_for_secrets(image, "curves.png")
    assert match.kind == "a Hugging Face token"
    [match] = scan_for_secrets(png({}) + secret.encode(), "curves.png")
    assert match.kind == "a Hugging Face token"


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(b"pairs", mtime=0),
        b"PK\x03\x04\xff",
        b"PAR1\x15\x04\x00\x00PAR1",
        "text".encode("utf-16"),
        "text".encode("utf-16-le"),
        b"\x89PNG\r\n\x1a\n cut off",
        b"\xff\xd8\xff\xe0 a photograph",
    ],
    ids=["gzip", "zip", "parquet", "utf-16", "utf-16 without BOM", "cut png", "jpeg"],
)
def test_content_that_cannot_be_scanned_is_reported(content, tmp_path):
    [match] = scan_for_secrets(content, "logs/x")
    assert match.location == "logs/x" and match.kind.startswith("content that cannot be scanned")
    (tmp_path / "x.safetensors").write_bytes(content)
    [match] = scan_for_secrets(tmp_path / "x.safetensors", "x.safetensors")
    assert match.kind.startswith("content that cannot be scanned")


def test_the_home_folder_of_this_machine_is_a_personal_path_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/data/" + "someone")
    (tmp_path / "x").write_text("/data/" + "someone/pairs.jsonl")
    assert [match.kind for match in scan_for_secrets(tmp_path / "x", "x")] == [
        "this machine's home folder"
    ]


def test_the_error_names_locations_and_repeats_no_secret(tmp_path):
    (tmp_path / "a").write_text("\n".join("hf_" + TAIL for _ in range(7)))
    with pytest.raises(ConfigError) as error:
        check_secrets({"notes.txt": tmp_path / "a"})
    message = str(error.value)
    assert message.startswith(
        "nothing was uploaded: notes.txt:1 has a Hugging Face token, notes.txt:2"
    )
    assert "and 2 more; remove it, or leave the file out" in message
    assert TAIL not in message
