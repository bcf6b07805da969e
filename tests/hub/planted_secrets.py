"""Secrets, personal paths and ordinary model cards, made from a seed at the time of the test.

No text here looks like a real key: prefixes and random characters are put together when needed.
"""

import base64
import json
from random import Random

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ALNUM = LETTERS + LETTERS.upper() + "0123456789"
LOWER = LETTERS + "0123456789"
UPPER = LETTERS.upper() + "0123456789"
HEX = "0123456789abcdef"
WORDS = ["correct", "horse", "battery", "staple", "violet", "engine", "quiet", "river"]


class Maker:
    """Random texts from a seed."""

    def __init__(self, seed):
        self.random = Random(seed)

    def text(self, size, alphabet=ALNUM):
        """Random characters, with a digit and a letter among them."""
        made = [self.random.choice(alphabet) for _ in range(size)]
        made[size // 2], made[size // 3] = self.random.choice("23456789"), alphabet[1]
        return "".join(made)

    def password(self):
        return self.random.choice([
            "-".join(self.random.sample(WORDS, 3)),
            self.text(12),
            self.random.choice(WORDS).title() + str(self.random.randrange(100, 999)) + "!",
        ])  # fmt: skip

    def base64(self, size):
        return base64.b64encode(self.random.randbytes(size)).decode()

    def jwt(self):
        parts = [{"alg": "HS256", "typ": "JWT"}, {"sub": self.text(10), "iat": 1700000000}]
        encoded = [base64.urlsafe_b64encode(json.dumps(p).encode()).decode() for p in parts]
        return ".".join([*(part.rstrip("=") for part in encoded), self.text(43)])

    def uuid(self):
        return "-".join(self.text(size, HEX) for size in (8, 4, 4, 4, 12))


def secrets(m):
    """Secrets by kind: about ninety kinds, each as it stands in a file."""
    user = m.random.choice(["alice", "bjoern", "chen", "dmitri"])
    host = m.random.choice(["db.internal", "10.0.0.7", "example.org"])
    return {
        "hf": "hf" + "_" + m.text(34),
        "hf oauth": "hf_" + "oauth_" + m.text(40),
        "hf jwt": "hf_" + "jwt_" + m.jwt(),
        "api_org": "api" + "_org_" + m.text(34),
        "openai": "sk" + "-proj-" + m.text(48),
        "openai legacy": "sk" + "-" + m.text(20) + "T3Blbk" + "FJ" + m.text(20),
        "anthropic": "sk" + "-ant-api03-" + m.text(80),
        "google": "AI" + "za" + m.text(35),
        "google oauth": "GOC" + "SPX-" + m.text(28),
        "google access": "ya" + "29." + m.text(60),
        "google refresh": "1/" + "/0" + m.text(40),
        "github": "gh" + "p_" + m.text(36),
        "github fine-grained": "github" + "_pat_" + m.text(22) + "_" + m.text(59),
        "github app": "gh" + "s_" + m.text(36),
        "gitlab": "gl" + "pat-" + m.text(20),
        "gitlab runner": "gl" + "rt-" + m.text(20),
        "slack": "xo" + "xb-" + m.text(12, "0123456789") + "-" + m.text(24),
        "slack webhook": "https://hooks.slack" + f".com/services/T{m.text(8, UPPER)}/B{m.text(24)}",
        "stripe": "sk" + "_live_" + m.text(24),
        "stripe restricted": "rk" + "_test_" + m.text(24),
        "aws id": "AK" + "IA" + m.text(16, UPPER),
        "aws secret": "aws_secret_access" + "_key = " + m.text(40),
        "aws session": '"aws_session' + '_token": "' + m.base64(60) + '"',
        "azure storage": "DefaultEndpointsProtocol=https;Account" + "Key=" + m.base64(64),
        "azure sas": "https://x.blob.example/a?sv=2022-11-02&" + "sig=" + m.text(43) + "%3D",
        "azure client": "AZURE_CLIENT" + "_SECRET=" + m.text(3) + "8Q" + "~" + m.text(34),
        "discord": "M" + m.text(23) + "." + m.text(6) + "." + m.text(27),
        "discord webhook": "https://discord.com/api/web" + "hooks/123456789012345678/" + m.text(60),
        "telegram": m.text(9, "123456789").replace("b", "5") + ":" + m.text(35),
        "sendgrid": "SG" + "." + m.text(22) + "." + m.text(43),
        "npm": "np" + "m_" + m.text(36),
        "npmrc": "//registry.example/:_auth" + "Token=" + m.uuid(),
        "pypi": "pypi" + "-AgEIcHlwaS5vcmc" + m.text(80),
        "docker": "dckr" + "_pat_" + m.text(27),
        "notion": "secret" + "_" + m.text(43),
        "notion new": "nt" + "n_" + m.text(46),
        "figma": "fi" + "gd_" + m.text(40),
        "shopify": "shp" + "at_" + m.text(32, HEX),
        "twilio": "S" + "K" + m.text(32, HEX),
        "twilio token": "TWILIO_AUTH" + "_TOKEN=" + m.text(32, HEX),
        "mailgun": "ke" + "y-" + m.text(32, HEX),
        "mailgun new": m.text(32, HEX) + "-" + m.text(8, HEX) + "-" + m.text(8, HEX),
        "mailchimp": m.text(32, HEX) + "-us" + "14",
        "vault": "hv" + "s." + m.text(90),
        "ngrok": "ngrok config add-auth" + "token 2" + m.text(26) + "_" + m.text(21),
        "ngrok yaml": "auth" + "token: 2" + m.text(26) + "_" + m.text(21),
        "wandb": "WANDB_API" + "_KEY=" + m.text(40, HEX),
        "kaggle": '{"user' + 'name": "ana", "k' + 'ey": "' + m.text(32, HEX) + '"}',
        "databricks": "da" + "pi" + m.text(32, HEX),
        "digitalocean": "do" + "p_v1_" + m.text(64, HEX),
        "groq": "gs" + "k_" + m.text(52),
        "replicate": "r" + "8_" + m.text(37),
        "nvidia": "nv" + "api-" + m.text(60),
        "linear": "lin" + "_api_" + m.text(40),
        "postman": "PM" + "AK-" + m.text(24, HEX) + "-" + m.text(34, HEX),
        "sentry": "snt" + "rys_" + m.text(60),
        "grafana": "gl" + "sa_" + m.text(32) + "_" + m.text(8, HEX),
        "supabase": "sb" + "p_" + m.text(40, HEX),
        "atlassian": "ATA" + "TT3" + m.text(60),
        "airtable": "pa" + "t" + m.text(14) + "." + m.text(64, HEX),
        "jwt": m.jwt(),
        "age": "AGE-SECRET" + "-KEY-1" + m.text(58, UPPER),
        "pem": "-----BEGIN " + "RSA PRIVATE" + " KEY-----",
        "openssh": "-----BEGIN " + "OPENSSH PRIVATE" + " KEY-----",
        "putty": "PuTTY-User-" + "Key-File-3: ssh-ed25519",
        "pkcs8": "MIIEvQ" + "IBADANBgkqhkiG9w0BAQEFAASC" + m.base64(60).rstrip("="),
        "pkcs1": "MIIEow" + "IBAAKCAQEA" + m.base64(60).rstrip("="),
        "jwk": '{"kty": "RSA", "n": "' + m.text(40) + '", "e": "AQAB", "d": "' + m.text(40) + '"}',
        "jwk oct": '{"k": "' + m.text(40) + '", "alg": "A256GCM", "kty": "oct"}',
        "basic": "Authorization: " + "Basic " + m.base64(15),
        "bearer": "Authorization: " + "Bearer " + m.text(40),
        "bearer json": '"Authorization": ' + '"Bearer ' + m.text(32) + '"',
        "url": f"postgres://{user}:{m.text(10)}@{host}:5432/data",
        "mongo": f"mongodb+srv://{user}:{m.text(12)}@{host}/x?retryWrites=true",
        "https": f"https://{user}:{m.text(16)}@{host}/repo.git",
        "env password": "DB_PASSWORD" + "=" + m.password(),
        "env pass": "DB_PASS" + "=" + m.password(),
        "mysql": "MYSQL_PWD" + "=" + m.password(),
        "export": "export SMTP_PASS" + "='" + m.password() + "'",
        "yaml": "db_password" + ": " + m.password(),
        "json password": '"password": ' + f'"{m.password()}"',
        "json pwd": '"pwd": ' + f'"{m.password()}"',
        "json passphrase": '"passphrase": ' + f'"{m.password()}"',
        "json token": '"token": ' + f'"{m.text(32)}"',
        "json refresh": '"refresh_token": ' + f'"{m.text(40)}"',
        "json client": '"client_secret": ' + f'"{m.text(24)}"',
        "json camel": '"clientSecret": ' + f'"{m.text(24)}"',
        "json api": '"apiKey": ' + f'"{m.text(32, HEX)}"',
        "python": "api_key" + f' = "{m.text(32)}"',
        "ado": "Server=x;User Id=sa;Pass" + f"word={m.text(10)};",
        "netrc": f"machine {host} login {user} " + f"password {m.text(10)}",
        "curl": f"curl -u {user}:" + f"{m.text(10)} https://{host}/",
        "flag": "tool --pass" + f"word {m.text(12)} --verbose",
        "sql": "CREATE USER x IDENTIFIED " + f"BY '{m.text(12)}'",
        "docker config": '{"auths": {"x": {"auth": "' + "dXNlcjpw" + 'YXNzd29yZA=="}}}',
        "secret base": "SECRET_KEY" + f"_BASE={m.text(64, HEX)}",
        "cookie": "Cookie: session" + f"id={m.text(32)}",
        "header": "X-API" + f"-Key: {m.text(32)}",
        "query": "https://example.org/x?access_" + f"token={m.text(32)}",
        "otp": "otp" + f"auth://totp/x?secret={m.text(16, UPPER)}",
        "one word": "PGPASS" + f"WORD={m.password()}",
        "short word": "dbpa" + f"ss={m.text(9)}",
        "phrase": "vault_password" + ": 'abc def ghi1'",
        "bare pass": "pass" + f": {m.text(10)}",
        "escaped": '"text": "{\\"api_key\\": ' + f'\\"{m.text(32)}\\"}}"',
        "percent": "token%3D" + "hf" + "_" + m.text(34),
    }  # fmt: skip


def personal_paths(m):
    """Paths that tell of a person or of a machine, by kind."""
    user = m.random.choice(["alice", "bjoern", "chen", "dmitri"])
    return {
        "home": f"/home/{user}/pairs.jsonl",
        "nested home": f"/export/home/{user}/x",
        "users": f"/Users/{user}/Documents/pairs.jsonl",
        "tilde": "~/projects/secret-client/pairs.jsonl",
        "tilde ssh": "~/.ssh/id_ed25519",
        "tilde of a user": f"~{user}/pairs.jsonl",
        "home variable": "$HOME/clients/pairs.jsonl",
        "home variable in braces": "${HOME}/clients",
        "profile": "%USERPROFILE%\\clients",
        "profile of PowerShell": "$env:USERPROFILE\\clients",
        "workspace": "/workspace/clients",
        "srv": "/srv/nas/clients",
        "mounted drive": "/content/drive/MyDrive",
        "kaggle folder": "/kaggle/working/pairs",
        "volumes": "/Volumes/Backup/pairs",
        "mnt": "/mnt/nas/pairs",
        "media": f"/media/{user}/usb",
        "private var": "/private/var/folders/x1/y",
        "var folders": "/var/folders/x1/y",
        "windows": f"C:\\Users\\{user}\\x",
        "windows json": f"C:\\\\Users\\\\{user}\\\\x",
        "windows slash": f"C:/Users/{user}/x",
        "drive": "D:\\clients\\pairs",
        "short drive": "D:\\models",
        "drive slash": "D:/models/x",
        "unc": "\\\\fileserver\\share\\pairs",
        "unc json": "\\\\\\\\fileserver\\\\share\\\\pairs",
        "file url": "file:///srv/pairs.jsonl",
        "run media": f"/run/media/{user}/usb",
        "scp": f"{user}@example.org:/data/pairs",
        "smb": "smb://nas/pairs",
        "wsl": "\\\\wsl$\\Ubuntu\\data",
        "root": "/ro" + "ot/run",
        "scratch": f"/scratch/{user}/run",
        "percent": f"%2Fhome%2F{user}%2Fx",
        "json escape": f"\\/Users\\/{user}\\/x",
    }


FORMS = (
    "{}",
    "    {}",
    "See `{}` for details.",
    "| setting | {} |",
    "```sh\n{}\n```",
    "> **prompt:** {}",
    "first line\r\n{}\r\nlast line",
)


def ordinary_cards(m):
    """Fifty short cards, configurations and metadata without any secret."""
    sha, commit, model = m.text(64, HEX), m.text(40, HEX), m.text(22)
    return [
        f"---\nlicense: apache-2.0\nbase_model: org/{model}\ntags: [dpo, mlx]\n---\n\n# Adapter",
        f"---\ndatasets:\n- org/pairs\nlanguage: [de, en]\nmodel-index: []\nsha: {commit}\n---\n",
        "password: required here\nusername: optional",
        "PRIMARY_KEY: something_long\nFOREIGN_KEY = user_id_of_the_row\nSORT_KEY: created_at_2024",
        "token: <your token>\napi_key: YOUR_API_KEY\npassword: ********\nsecret: ${SECRET}",
        'bos_token: <|begin_of_text|>\neos_token: "<|eot_id|>"\npad_token: <|finetune_pad_id|>',
        '{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": null}',
        '{"eos_token_id": [128001, 128008], "bos_token_id": 128000, "pad_token_id": 128004}',
        '{"additional_special_tokens": ["<|im_start|>"], "model_max_length": 131072}',
        '{"added_tokens_decoder": {"151643": {"content": "<|endoftext|>", "special": true}}}',
        f'{{"sha256": "{sha}", "mlx_dpo_digest": "{sha[:12]}", "format": "mlx"}}',
        f'{{"adapters.safetensors": "sha256:{sha}", "config": "{commit}"}}',
        f"commit {commit}\nAuthor: somebody\n\n    Fix the loss",
        f"The adapter's sha256 is `{sha}`.",
        f"| file | sha256 |\n|---|---|\n| adapters.safetensors | {sha} |",
        f"Base model: [org/{model}](https://huggingface.co/org/{model})",
        f"![curves](https://huggingface.co/org/name/resolve/{commit}/curves.png)",
        'export HF_TOKEN="<your token>"\nhf auth login --token $HF_TOKEN',
        "export OPENAI_API_KEY=$MY_KEY\nexport WANDB_API_KEY=...",
        "export HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "import os\ntoken = os.environ['HF_TOKEN']\napi_key = os.getenv('API_KEY')",
        "client = OpenAI(base_url='http://localhost:8080/v1', api_key='not-needed')",
        "client = OpenAI(api_key=os.environ.get('OPENAI_API_KEY'), timeout=30)",
        'tokenizer = AutoTokenizer.from_pretrained("org/name", token=True)',
        "key = jax.random.PRNGKey(0)\nkey, subkey = split(key)\nkeys: 8 heads, values: 8 heads",
        'curl http://localhost:8080/v1/models -H "Authorization: Bearer $TOKEN"',
        'curl https://api.example.org -H "Authorization: Bearer YOUR_TOKEN_HERE"',
        "headers = {'Authorization': f'Bearer {token}'}",
        "git clone https://github.com/org/name && cd name && pip install -e .",
        "postgres://user:password@localhost/db is the form of the address; <user>:<password>@host",
        "https://huggingface.co/org/name/tree/main/home/index and http://example.org/Users/list",
        "hf download org/name --local-dir adapter\nmlx-dpo chat --model base --adapter adapter",
        "The model is cached in ~/.cache/huggingface; add it to your ~/.bashrc.",
        "cd /home/user/project; ls /Users/username/Desktop; the /home/ folder",
        "about ~90 % of ~1,000 pairs, ~/~ and ~~struck~~ text, a/b and and/or, km/h",
        "forward pass: something, first pass: tokenization, passes: 3, bypass: true",
        "The secret: patience. My secret is butterflies; her passwords were many",
        "keyword: attention_mask_shape\nmonkey: business\nhotkey=ctrl+shift+p\nkeyboard: qwerty1",
        "tokens: 1234567890\nnum_tokens=5153\nmax_tokens: 100000\ntokens_per_second: 1234.5678",
        "| `eval_loss` | 0.5123 |\n| `eval_margins` | 1.2345 |\n| `learning_rate` | `5e-06` |",
        '{"step": 10, "loss": 0.693147, "learning_rate": 5e-06, "tokens_per_second": 1234.5}',
        '{"rank": 8, "scale": 2.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}',
        '{"target_modules": ["q_proj", "k_proj"], "bias": null, "task_type": "CAUSAL_LM"}',
        "tokenizer: LlamaTokenizerFast\ntoken_type: byte_bpe_32k\ncache_key: layer_12_head_3",
        "$$\\mathcal{L} = -\\log\\sigma(\\beta x) \\\\ \\hline \\alpha\\beta$$ and $a \\\\ b$",
        "\\begin{tabular}{ll} a & b \\\\\\hline c & d \\\\ \\end{tabular}",
        "> **prompt:** What is a password?\n>\n> **after:** A password: a word that lets you in.",
        "> **before:** Use a token. Token: a unit.\n>\n> **after:** The key: practice daily.",
        "```yaml\nauth: none\ntoken: null\npassword: \"\"\nsecret: false\napi_key: optional\n```",
        f"uuid {m.uuid()}, arXiv:2305.18290, DOI 10.48550/arXiv.2305.18290, ids {m.text(11)}",
        "@misc{rafailov2023, key={DPO}, title={Direct Preference Optimization}, year={2023}}",
        "`--report-to wandb` logs to W&B; risk-neutral, task-oriented sk-learn-like estimators",
        "client = OpenAI(api_key='EMPTY'); other = OpenAI(api_key='lm-studio', model='x')",
        "git clone git@github.com:org/name.git; see docs/media/picture.png and (media/x.png)",
        "api-key authentication: the key: value pairs of author=Rafailov2023",
        "bypass: step12abc, compass=north123, the pass: 2 of 3; Q:\\nWhat? A:\\nthe cat",
        "Contact: someone@example.org. Time 10:30:45, ratio 16:9, 1234567890:end",
        "| `model` | `not shown` |\n| `token` | `not shown` |\n| `password` | `required` |",
    ]  # fmt: skip
