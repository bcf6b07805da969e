"""Patterns of secrets and of personal paths: those of detect-secrets, and those it lacks.

Patterns of tokens know the token's form. An assignment such as `DB_PASS=…` is found by its name,
and its value is judged, so that `password: required` and `PRIMARY_KEY: user_id` are no secrets.
"""

import base64
import re
from collections.abc import Iterator
from functools import cache

START = r"(?<![A-Za-z0-9])"  # no letter or digit before
DIGIT = r"(?=[\w.~+/=-]*\d)"  # a digit among the characters of a token
IN_PATH = r"(?<![\w.:/~-])(?:/[\w.-]+){0,4}"  # the beginning of an absolute path, not of a URL

TOKENS = {
    "a Hugging Face token": rf"{START}(?:hf|api_org)_[A-Za-z0-9]{{30,}}"
    rf"|{START}hf_(?:oauth|jwt|app|refresh|sso)_{DIGIT}[\w.=-]{{16,}}",
    "an OpenAI, Anthropic or DeepSeek key": rf"{START}sk-{DIGIT}[A-Za-z0-9_-]{{20,}}",
    "a model provider's key": rf"{START}(?:gsk_|xai-|pplx-|r8_|nvapi-|tgp_v1_|jina_|pcsk_|fw_"
    rf"|tvly-|lsv2_\w\w_|csk-|esecret_|ABSK){DIGIT}[A-Za-z0-9_-]{{24,}}",
    "a GitHub token": rf"{START}(?:gh[oprsu]_[A-Za-z0-9]{{30,}}|github_pat_[A-Za-z0-9_]{{30,}})",
    "a GitLab token": rf"{START}(?:gl(?:pat|ptt|dt|rt|rtr|cbt|soat|oas|ft|imt|agent|ffct)-"
    rf"|GR1348941){DIGIT}[\w.-]{{20,}}",
    "an AWS key": rf"{START}(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{{16}}\b|\bamzn\.mws\.[0-9a-f-]{{36}}",
    "a Google key": rf"\b(?:AIza[\w-]{{35}}|GOCSPX-[\w-]{{20,}}|ya29\.[\w-]{{20,}}"
    rf"|1//0{DIGIT}[\w-]{{30,}})",
    "a Slack token": r"\bxox[abcdeoprs](?:\.xox[bp])?-[0-9A-Za-z-]{10,}|\bxapp-[0-9A-Za-z-]{20,}"
    r"|hooks\.slack\.com/(?:services|workflows|triggers)/[\w/]{8,}",
    "a Stripe key": r"\b(?:sk|rk)_(?:live|test|prod)_[0-9A-Za-z]{20,}|\bwhsec_[0-9A-Za-z+/]{20,}",
    "an Azure key": r"\b(?:Account|SharedAccess)Key=[A-Za-z0-9+/]{30,}=*"
    r"|[?&]sig=(?=[\w%+/-]*\d)[\w%+/-]{30,}|(?<![\w~.-])[\w~.-]{3}\dQ~[\w~.-]{30,}",
    "a Discord token": r"discord(?:app)?\.com/api/webhooks/\d+/[\w-]{20,}",
    "a Telegram token": r"(?<![\w-])\d{8,10}:(?=\w*[A-Za-z])[\w-]{35}(?![\w-])",
    "a Notion token": rf"{START}(?:secret_|ntn_){DIGIT}[A-Za-z0-9]{{30,}}",
    "a Figma token": rf"{START}fig[dour]r?_{DIGIT}[\w-]{{20,}}",
    "a Shopify token": rf"{START}shp(?:at|ca|pa|ss|tka|ua)_[A-Za-z0-9]{{20,}}",
    "a Twilio key": rf"{START}(?:AC|SK)[0-9a-f]{{32}}\b",
    "a Mailgun key": rf"{START}key-{DIGIT}[0-9a-z]{{32}}\b"
    r"|(?<![\w-])[0-9a-f]{32}-[0-9a-f]{8}-[0-9a-f]{8}(?![\w-])",
    "a Vault token": rf"{START}hv[sbr]\.{DIGIT}[\w-]{{20,}}"
    rf"|{START}s\.(?=\w*\d)(?=\w*[A-Z])[A-Za-z0-9]{{24}}\b",
    "an ngrok token": rf"(?i:ngrok)[^\n]{{0,40}}?{START}(?=\w*\d)[A-Za-z0-9]{{18,}}_?\w{{10,}}"
    rf"|{START}[12](?=\w*[A-Z])[A-Za-z0-9]{{26}}_[A-Za-z0-9]{{20,22}}\b",
    "a token of a package registry": rf"{START}npm_[A-Za-z0-9]{{30,}}|\bpypi-AgE[IN][\w-]{{30,}}"
    rf"|{START}rubygems_[0-9a-f]{{40,}}|{START}dckr_(?:pat|oat)_[\w-]{{20,}}"
    rf"|\bCLOJARS_[0-9a-f]{{50,}}|\bcio{DIGIT}[A-Za-z0-9]{{32}}\b",
    "a token of a cloud service": r"\bdapi[0-9a-f]{32}|\bdo[opr]_v1_[0-9a-f]{64}"
    rf"|\bSG\.[\w-]{{16,}}\.[\w-]{{20,}}|{START}lin_api_\w{{32,}}|\bPMAK-[\w-]{{30,}}"
    rf"|{START}(?:sntry[su]|glsa|glc|sbp|sb_secret|nfp|vc[pkair]|pul|tskey|rnd|EAACEdEose0cBA"
    rf"|xkeysib|ATATT3|ATCTT3|ATBB|NRAK|CFPAT|rdme|ops|pscale_\w+|FLWSECK|fio-u|dp\.\w\w)[_.-]?"
    rf"(?=\w*\d){DIGIT}[\w=+/-]{{24,}}|\bpat[A-Za-z0-9]{{14}}\.[0-9a-f]{{64}}"
    rf"|{START}sl\.{DIGIT}[\w-]{{60,}}|\bpat-(?:na|eu)1-[0-9a-f-]{{36}}|\bsha256~[\w-]{{43}}"
    r"|\bEAA[A-Za-z0-9]{60,}|\bsq0(?:atp|csp|idp)-[\w-]{22,}|\bFlyV1 fm\d_\S{20,}"
    r"|[0-9a-z]{14}\.atlasv1\.[\w-]{40,}|\baccess-(?:sandbox|production)-[0-9a-f-]{36}",
    "a W&B key": r"(?i)wandb[\w \"':=-]{0,30}\b[0-9a-f]{40}\b|\bwandb_v\d_\w{40,}",
    "a Kaggle key": r"[\"']username[\"']\s*:[^{}]*[\"']key[\"']\s*:\s*[\"'][0-9a-f]{32}[\"']",
    "a private key": r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|BEGIN SSH2 ENCRYPTED PRIVATE KEY"
    r"|PuTTY-User-Key-File-\d|^Private-(?:Lines|MAC|Hash): |\bAGE-SECRET-KEY-1[A-Z0-9]{40,}"
    r"|MII[\w+/]{3}IBA(?:DAN|AKC)|MC4CAQAwBQYDK2V"  # base64 of PKCS8, PKCS1 and ed25519 keys
    r"|(?<![A-Za-z0-9+/])MI[IGHC](?=[A-Za-z+/]*\d)[A-Za-z0-9+/]{40,}",
    "a JSON web key": r"[\"']kty[\"']\s*:[^{}]*[\"'][dkp][\"']\s*:\s*[\"'][\w-]{8,}"
    r"|[\"'][dkp][\"']\s*:\s*[\"'][\w-]{8,}[\"'][^{}]*[\"']kty[\"']\s*:",
    "a session cookie": r"(?i)\bcookie\s*:\s*[^\n]*?=(?=[\w%.-]*\d)[\w%.-]{16,}",
    "a seed of one-time passwords": r"\botpauth://\S",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.",
}

# Values of the group `value` are judged by `is_placeholder`.
PASSWORDS = {
    "a password in a URL": r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@\"'`<>]*:"
    r"(?P<value>[^\s/@\"'`]+)@",
    "a password or key": r"(?i:\b(?:proxy-)?authorization)[\"']?\s*[:=]\s*[\"']?"
    r"(?i:basic|bearer|token|apikey|digest|bot)\s+(?P<value>[\w.~+/=:-]{8,})"
    r"|(?i:\bbearer)\s+(?=\S*\d)(?P<bearer>[A-Za-z0-9._~+/-]{20,})"
    r"|(?i:\blogin)\s+\S+\s+(?i:password)\s+(?P<netrc>\S{4,})"
    r"|\bcurl\b[^\n]*?\s(?:-u|--user)[ =]?[\"']?[^\s:\"']+:(?P<curl>[^\s\"']{4,})"
    r"|(?<![\w-])--?(?i:[a-z-]*(?:password|passwd|passphrase|pwd|secret|token|api-?key))[ =]"
    r"[\"']?(?P<flag>(?=[^\s\"']*\d)[^\s\"'<>$-][^\s\"'<>$]{7,})"
    r"|\b(?i:identified\s+by)\s+[\"'](?P<sql>[^\"']{4,})"
    r"|\bsshpass\s+-p\s*[\"']?(?P<ssh>[^\s\"']{4,})|\bmysql\w*\b[^\n]*?\s-p(?P<mysql>[^\s-]{4,})",
}

NAMES = r"user(?:name)?|you|your[_-]?\w*|name|me|\.\.\.|\$\w+|\{\w+\}|<[^>]*>"
PERSONAL_PATHS = {
    "a personal path": rf"{IN_PATH}/(?:home|Users)/(?!(?:{NAMES})\b)[^\s/\\\"'`<>|:;,)\]}}]+"
    r"|\b[A-Za-z]:(?:\\{1,2}|/)(?i:users|documents and settings)(?:\\{1,2}|/)"
    rf"(?!(?:{NAMES})\b)[^\s/\\\"'`<>|:;,)]+"
    r"|\b[A-Z]:\\{1,2}(?!(?i:users|program files|windows)\b|[nrt](?:[A-Z\d]|\\[nrtu\"]))"
    r"\w[\w .-]*\\{1,2}\w|\b[A-Z]:\\{1,2}(?!(?i:users|program files|windows)\b)[^\W_bfnrtu]\w+"
    r"|\b[A-Z]:/(?!(?i:users|program files|windows)\b)\w[\w .-]*/\w"
    rf"|{IN_PATH}/root(?=[/\"'\s`]|$)|(?<!\w)/var/folders/\w|(?<![\w.-])/private/(?:var|tmp|etc)/"
    rf"|{IN_PATH}/(?:Volumes|mnt|media|scratch|gpfs|lustre|nfs|srv|workspace|kaggle)/[\w.-]*\w"
    rf"|{IN_PATH}/content/drive/\w"
    r"|(?:\$HOME|\$\{HOME\})/(?!\.(?:cache|bashrc|zshrc|profile|bash_profile)\b)[\w.]"
    r"|(?:%(?:USERPROFILE|HOMEPATH|(?:LOCAL)?APPDATA)%|\$env:(?:USERPROFILE|HOME|APPDATA))[\\/]\w"
    r"|(?<![\w~/.)-])~[a-z_][\w-]*/[\w.]"
    r"|\bfile:/{1,3}[\w~.%-]|\b(?:smb|afp|nfs|cifs|sftp|ssh)://\w|\b[\w.-]+@[\w.-]+:[~/]\w"
    r"|(?<![\w~/.)-])~/(?!Library/Caches\b|\.(?:cache|bashrc|zshrc|profile|bash_profile)\b)"
    r"[\w.]"
    r"|(?<![\\\w])\\\\(?!(?:\w*line|\w*rule|end|begin|left|text\w*|math\w*|frac)\b)"
    r"[A-Za-z0-9][\w.$-]*\\[\w$][\w$ .-]+"
    r"|(?<![\\\w])\\{4}[A-Za-z0-9][\w.-]*\\\\[\w$][\w$ .-]+",
}

# Names of variables, by their words in lower case.
PASSWORD_WORDS = {
    "password", "passwd", "passphrase", "passcode", "pwd", "passwort", "pw", "secret",
    "credential", "credentials",
}  # fmt: skip
KEY_OWNERS = {
    "access", "account", "admin", "api", "app", "application", "auth", "client", "consumer",
    "deploy", "django",
    "encryption", "github", "hmac", "license", "master", "private", "secret", "service", "session",
    "shared", "signing", "ssh", "storage", "write",
}  # fmt: skip
TOKEN_OWNERS = {
    "access", "api", "app", "auth", "bearer", "bot", "client", "csrf", "deploy", "gh", "github",
    "gitlab", "hf", "hub", "id", "jwt", "oauth", "personal", "refresh", "secret", "security",
    "service", "session", "user", "vault",
}  # fmt: skip
ENDINGS = {
    "base",
    "value",
    "text",
    "string",
    "prod",
    "dev",
    "staging",
    "main",
    "old",
    "new",
    "1",
    "2",
}
NOT_PASSWORDS = {"forward", "backward", "first", "second", "third", "one", "two", "single", "multi"}
ENDS_WITH_PASS = {"bypass", "compass", "encompass", "overpass", "surpass", "trespass", "underpass"}
ASSIGNED = re.compile(
    r"(?i:pass(?:word|wd|phrase|code|wort)?|pwd?|secrets?|tokens?|keys?|credentials?|auth)"
    r"(?P<rest>[\w-]{0,40})(?P<mark>[\"']?)\s*(?P<sign>:=|=>|=|:)(?![:=/])\s*"
    r"(?P<quote>\\?[\"'`])?(?P<value>[^\s\"'`,;{}\[\]()<>|\\]+)(?P<after>[^\n]{0,20})"
)
NAME_BEFORE = re.compile(r"[A-Za-z_][\w.-]{0,60}$")
WORDS_OF_NAME = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
PLACEHOLDER = re.compile(
    r"(?i)[<$*{%.…(].*|x{3,}(?:[\W_x].*)?|.*\*{3,}.*|.*\.{3,}.*|.*(?:\$\{|\{\{|<\w+>).*|(?:os|env|process"
    r"|self|config|args|settings|getenv|st|secrets|userdata|getpass)[.\[(].*|your.*|(?:my|the|some"
    r"|an?|insert|enter|put|set|add|change|replace|paste)(?:[\W_].*)?|.*(?:example|placeholder|redacted|changeme|change_me|dummy|_here"
    r"|-here)\b.*|none|null|nil|true|false|yes|no|required?|optional|string|str|text|integer"
    r"|hidden|missing|unknown|default|empty|not(?:[\W_].*)?|unset|undefined|encrypted|password|passwd|pass|pwd"
    r"|secret|token|key|api_?key|hf_token|test|user|n/?a|tbd|todo|enabled|disabled|any|value"
    r"|.*(?:required|needed|no-key|goes-here).*|bool(?:ean)?|sensitive|protected|masked|void|Optional\b.*"
)
MIXED = re.compile(r"(?=.*\d)(?=.*[A-Za-z])")


def is_crossed_out(token: str) -> bool:
    """Return whether a text in the form of a token is made of the letter x, as in `hf_xxxxxxxx`."""
    return re.fullmatch(r"(?i)(?:\w{2,10}[_-])*x{6,}", token) is not None


def is_placeholder(value: str) -> bool:
    """Return whether a value stands for a secret that the reader has to put there."""
    shown = value.rstrip(".,;:!?)\"'`")
    return PLACEHOLDER.fullmatch(shown) is not None or is_crossed_out(shown)


@cache
def compiled_patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Return all patterns with what they find, those of detect-secrets last."""
    own = TOKENS | PASSWORDS | PERSONAL_PATHS
    patterns = [(kind, re.compile(pattern, re.MULTILINE)) for kind, pattern in own.items()]
    return (*patterns, *_patterns_of_detect_secrets())


def _patterns_of_detect_secrets() -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield the patterns of detect-secrets' plugins; none of them is verified over the network.

    Its plugins for entropy, keywords and IP addresses are left out: they find digests, ordinary
    words and version numbers. That for Artifactory finds words that begin with `AP`.
    """
    from detect_secrets.plugins import (  # imported here because it imports `requests`
        aws,
        azure_storage_key,
        cloudant,
        discord,
        github_token,
        gitlab_token,
        ibm_cloud_iam,
        ibm_cos_hmac,
        mailchimp,
        npm,
        openai,
        private_key,
        pypi_token,
        sendgrid,
        slack,
        softlayer,
        square_oauth,
        stripe,
    )

    plugins = (
        aws.AWSKeyDetector, azure_storage_key.AzureStorageKeyDetector, cloudant.CloudantDetector,
        discord.DiscordBotTokenDetector, github_token.GitHubTokenDetector,
        gitlab_token.GitLabTokenDetector, ibm_cloud_iam.IbmCloudIamDetector,
        ibm_cos_hmac.IbmCosHmacDetector, mailchimp.MailchimpDetector, npm.NpmDetector,
        openai.OpenAIDetector, private_key.PrivateKeyDetector, pypi_token.PypiTokenDetector,
        sendgrid.SendGridDetector, slack.SlackDetector, softlayer.SoftlayerDetector,
        square_oauth.SquareOAuthDetector, stripe.StripeDetector,
    )  # fmt: skip
    for plugin in plugins:
        for pattern in plugin.denylist:
            yield f"a secret ({plugin.secret_type})", pattern


def find_assignments(text: str) -> Iterator[int]:
    """Yield where a secret is assigned to a name such as `DB_PASS`, as an offset in `text`."""
    for match in ASSIGNED.finditer(text):
        start = match.start()
        before = NAME_BEFORE.search(text[max(0, start - 60) : start])
        name = (before[0] if before else "") + text[start : match.start("sign")].rstrip(" \t\"'")
        if _is_secret(name, match):
            yield start


def _is_secret(name: str, match: re.Match[str]) -> bool:
    """Return whether the match of `ASSIGNED` assigns a secret to a variable called `name`."""
    value, quote, sign = match["value"], match["quote"], match["sign"]
    if is_placeholder(value) or (not quote and _is_variable(value, match["after"])):
        return False
    kind = _kind_of_name(name, is_quoted=bool(match["mark"]))
    is_unquoted_text = not quote and sign == ":"
    if kind == "password":
        if is_unquoted_text and re.match(r"[^\S\n]+\w", match["after"]):
            return MIXED.match(value) is not None  # a word of a sentence has no digits
        shortest = 4 if quote or MIXED.match(value) else 8 if is_unquoted_text else 6
        rest = match["after"].split(quote[-1])[0] if quote else ""  # of a phrase with blanks
        return len(value + rest) >= shortest
    if kind == "key":
        return len(value) >= 8 and (MIXED.match(value) or _is_random_case(value)) is not None
    if kind == "token":
        return _is_random(value)
    return kind == "auth" and (_is_random(value) or _is_basic_auth(value))


def _kind_of_name(name: str, *, is_quoted: bool) -> str | None:
    """Return what the name promises: a password, a key, a token, or login data (`auth`).

    Passwords may be words; keys have digits, and tokens look random.
    """
    words = [word.lower() for word in WORDS_OF_NAME.findall(name)]
    while len(words) > 1 and words[-1] in ENDINGS:
        words.pop()
    if not words:
        return None
    owners, last = set(words[:-1]), words[-1].removesuffix("s")
    if last in PASSWORD_WORDS or words[-1] in PASSWORD_WORDS:
        is_clear = last != "secret" or owners or is_quoted or name.isupper()
        return "password" if is_clear else "token"
    if last.endswith(("password", "passwd", "passphrase", "pwd")):  # PGPASSWORD, dbpassword
        return "password"
    if words[-1].endswith("pass"):
        return _kind_of_pass(words[-1], owners, is_quoted=is_quoted)
    return _kind_of_key(last, owners, is_upper=name.isupper())


def _kind_of_pass(word: str, owners: set[str], *, is_quoted: bool) -> str | None:
    """Return what a name that ends in `pass` promises, such as `DB_PASS` or `forward_pass`."""
    if word in ENDS_WITH_PASS or NOT_PASSWORDS & owners:
        return None
    return "password" if word == "pass" and (owners or is_quoted) else "key"


def _kind_of_key(last: str, owners: set[str], *, is_upper: bool) -> str | None:
    """Return what a name that ends in `key`, `token` or `auth` promises."""
    if last in ("apikey", "secretkey", "accesskey", "authkey"):
        return "key"
    if last == "key" and (owners & KEY_OWNERS or is_upper):
        return "key" if owners & KEY_OWNERS else "token"
    if last in ("token", "authtoken"):
        return "key" if owners & TOKEN_OWNERS else "token"
    return "auth" if last == "auth" else None


def _is_variable(value: str, after: str) -> bool:
    """Return whether an unquoted value is a name, such as that of a variable in a call."""
    return re.fullmatch(r"[A-Z]+(?:_[A-Z]+)+", value) is not None or (
        re.fullmatch(r"[A-Za-z_][A-Za-z_.]*", value) is not None and after[:1] in {",", ")", "("}
    )


def _is_random(value: str) -> bool:
    """Return whether a value looks like a generated token and not like a name or a path."""
    if len(value) < 12 or not re.fullmatch(r"[\w+/=.~:-]+", value) or "://" in value:
        return False
    longest = max(re.split(r"[_./:-]", value), key=len)
    return len(longest) >= 10 and (MIXED.match(longest) or _is_random_case(longest)) is not None


def _is_random_case(value: str) -> re.Match[str] | None:
    """Return a match if a text of 16 or more letters has capitals where no word has them."""
    return re.match(r"(?=.{16})(?=(?:.*[A-Z]{2}){2})(?=(?:.*[a-z][A-Z]){3})", value)


def _is_basic_auth(value: str) -> bool:
    """Return whether a value is base64 of `user:password`."""
    try:
        return re.fullmatch(rb"[ -~]+:[ -~]+", base64.b64decode(value, validate=True)) is not None
    except ValueError:
        return False
