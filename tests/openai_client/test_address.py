"""Which addresses may be used, and who gets an API key."""

import pytest

from mlx_dpo.errors import ConfigError
from mlx_dpo.openai_client.address import is_address, parse_address
from mlx_dpo.openai_client.connection import Connection, bind_connection

OPENAI = "https://api.openai.com/v1#m"


@pytest.mark.parametrize(
    ("spec", "url", "host", "model"),
    [
        ("http://127.0.0.1:1234/v1#qwen3:8b", "http://127.0.0.1:1234/v1", "127.0.0.1", "qwen3:8b"),
        ("http://localhost/v1/#org/m#2", "http://localhost/v1", "localhost", "org/m#2"),
        ("HTTPS://API.Example.com/v1", "https://api.example.com/v1", "api.example.com", None),
        ("http://[::1]:8080/v1#", "http://[::1]:8080/v1", "::1", None),
    ],
)
def test_an_address_has_a_url_and_perhaps_a_model(spec, url, host, model):
    address = parse_address(spec)
    assert is_address(spec)
    assert (address.url, address.host, address.model) == (url, host, model)


@pytest.mark.parametrize("spec", ["org/model", "./http", "ftp://host/v1", "run", "", None])
def test_a_folder_or_a_hub_id_is_no_address(spec):
    assert not is_address(spec)


@pytest.mark.parametrize(
    "spec", ["http://", "http://h:0/v1", "http://h:65536/v1", "http://h:x/v1", "http://[::1/v1"]
)
def test_an_address_without_a_host_or_with_a_wrong_port_is_refused(spec):
    with pytest.raises(ConfigError, match=r"not an address.*; use http://127\.0\.0\.1:1234/v1"):
        Connection(allow_remote=True).open(spec)


@pytest.mark.parametrize(
    "spec", ["https://user:secret@host/v1#m", "https://secret@host/v1", "https://h/v1?key=secret"]
)
def test_a_password_in_an_address_is_refused_and_not_shown(spec):
    with pytest.raises(ConfigError, match="would be stored") as error:
        parse_address(spec)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "[::1]", "localhost", "LOCALHOST"])
def test_this_machine_needs_no_permission(host):
    assert Connection().open(f"http://{host}:80/v1").is_loopback


@pytest.mark.parametrize(
    "host",
    [
        "localhost.example.com",
        "127.0.0.1.example.com",
        "0x7f000001",  # some systems read it as 127.0.0.1, but nothing guarantees it
        "2130706433",
        "127.1",
        "0.0.0.0",
        "192.168.1.5",
        "studio.local",
        "1.1.1.1",
    ],
)
def test_another_machine_needs_a_permission(host):
    spec = f"https://{host}/v1"
    with pytest.raises(ConfigError, match=r"is not this machine.*add --allow-remote"):
        Connection().open(spec)
    assert not Connection(allow_remote=True).open(spec).is_loopback


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("192.168.1.5", True),
        ("10.0.0.7:1234", True),
        ("172.16.0.1", True),
        ("[fd00::1]", True),
        ("169.254.3.4", True),
        ("studio.local", True),
        ("172.32.0.1", False),
        ("1.1.1.1", False),
        ("100.64.0.1", False),
        ("[2001:4860::1]", False),
        ("example.com", False),
        ("local.example.com", False),
    ],
)
def test_plain_http_stays_in_the_local_network(host, is_allowed):
    connection = Connection(allow_remote=True)
    if is_allowed:
        connection.open(f"http://{host}/v1")
    else:
        with pytest.raises(ConfigError, match="could read what is sent over plain http"):
            connection.open(f"http://{host}/v1")
    connection.open(f"https://{host}/v1")


def test_only_openai_gets_the_key_of_openai_unless_the_variable_is_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    connection = Connection(allow_remote=True)
    for spec, expected in (
        (OPENAI, "sk-1"),
        ("https://api.example.com/v1", None),
        ("https://api.openai.com.example.com/v1", None),
        ("http://127.0.0.1:1234/v1", None),
    ):
        assert connection.api_key(connection.open(spec)) == expected
    named = Connection(api_key_env="OPENAI_API_KEY")
    assert named.api_key(named.open("http://127.0.0.1:1234/v1")) == "sk-1"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "MY_KEY: the environment variable is not set"),
        (" ", "MY_KEY: the environment variable is not set"),
        ("se\ncret", "MY_KEY: not an API key"),
        ("sécret", "MY_KEY: not an API key"),
    ],
)
def test_a_missing_or_wrong_key_is_an_error_that_does_not_show_it(monkeypatch, value, message):
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    connection = Connection(api_key_env="MY_KEY")
    with pytest.raises(ConfigError) as error:
        connection.api_key(connection.open("http://127.0.0.1/v1"))
    assert str(error.value).startswith(message) and "cret" not in str(error.value)


def test_a_named_key_goes_to_one_host_only(monkeypatch):
    monkeypatch.setenv("MY_KEY", "k")
    remote, local = "https://api.example.com/v1#m", "http://127.0.0.1:1/v1#m"
    connection = Connection(allow_remote=True, api_key_env="MY_KEY")
    bound = bind_connection(connection, [remote, None, "org/model", local])
    assert bound.api_key(bound.open(remote)) == "k"
    assert bound.api_key(bound.open(local)) is None
    with pytest.raises(ConfigError, match=r"api\.example\.com and api\.openai\.com would both get"):
        bind_connection(connection, [remote, OPENAI])


@pytest.mark.parametrize(
    ("settings", "specs", "message"),
    [
        ({"allow_remote": True}, ["http://127.0.0.1/v1"], "`allow_remote` has no effect"),
        ({"allow_remote": True}, [None, "org/m"], "`allow_remote` has no effect"),
        ({"api_key_env": "K"}, ["org/m"], "`api_key_env` has no effect"),
        ({"max_concurrency": 2}, [None], "`max_concurrency` has no effect"),
        ({"request_timeout": 2.0}, [], "`request_timeout` has no effect"),
        ({}, ["https://example.com/v1"], "add --allow-remote"),
    ],
)
def test_settings_without_effect_are_refused(settings, specs, message):
    with pytest.raises(ConfigError, match=message):
        bind_connection(Connection(**settings), specs)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_concurrency": 0},
        {"request_timeout": 0},
        {"request_timeout": float("nan")},
        {"request_timeout": float("inf")},
    ],
)
def test_settings_out_of_bounds_are_refused(settings):
    with pytest.raises(ConfigError, match="must be"):
        Connection(**settings)
