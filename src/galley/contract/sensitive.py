"""What looks like a secret: by its name, or by itself. For everything that Galley writes; the standard library only.

No detector finds every secret. This one knows names that people give to secrets, passwords and tokens in URLs, HTTP
headers, and the forms of tokens that services mark so that scanners find them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Whole words of a name, so that TOKENIZERS_PARALLELISM is none.
_WORDS = (
    r"TOKENS?|SECRETS?|PASS|PASSWORDS?|PASSWD|PASSPHRASE|PASSWORT|PWD|PW|PG_?PASS|PGPASSWORD|CREDENTIALS?|CREDS?|AUTH|AUTHORIZATION|BEARER"
    r"|JWT|PAT|COOKIES?|APIKEY|(?:API|ACCESS|PRIVATE|SECRET|AUTH|ACCOUNT|SIGNING|ENCRYPTION|MASTER|STORAGE|SSH|DEPLOY)_?KEY"
)
_NAME = re.compile(rf"(?:^|[_.-])(?:{_WORDS})(?:$|[_.-])", re.IGNORECASE)
_PLACE = re.compile(r"(?:_(?:FILE|PATH|DIR|SOCK)|^(?:OLD)?PWD|^GOOGLE_APPLICATION_CREDENTIALS)$", re.IGNORECASE)
"""Names of where something lies, whatever it is."""

_IN_NAME = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_ADDRESS = re.compile(r"://[^/\s]*@")

_QUERY = (
    r"(?:access_|auth_|id_|refresh_|private_|job_)?token|api_?key|apikey|key|secret|sig|signature|password|passwd|pass|pwd"
    r"|auth|code|credential|x-(?:amz|goog|oss|cos)-(?:signature|credential|security-token)|awsaccesskeyid|googleaccessid"
)
# A single slash, too: what was taken for a path (GALLEY_CACHE) has lost the other.
URL_PASSWORD = re.compile(r"([a-z][a-z0-9+.-]*:/{1,2}[^/\s:@<>\"'?#]*:)[^/\s@<>\"']+(?=@)", re.IGNORECASE)
URL_USER = re.compile(r"(\bhttps?:/{1,2})[^/\s:@<>\"'?#]+(?=@)", re.IGNORECASE)
URL_QUERY = re.compile(rf"([?&;](?:amp;)?(?:{_QUERY})=)[^&\s#<>\"']{{4,}}", re.IGNORECASE)
HEADER = re.compile(
    r"(\b(?:proxy-)?authorization\b[\"']?(?:&#3[49];)?\s*[:=]\s*[\"']?(?:&#3[49];)?(?:\w+\s+)?|\bbearer\s+|\bbasic\s+(?=[\w+/]{12,}=))"
    r"[\w.~+/=-]{8,}|(\b(?:set-)?cookie\b\s*:\s*)[^\s<>][^<>\n]{7,}|(\bx-(?:api-key|auth-token)\b\s*:\s*)[^\s<>]{8,}",
    re.IGNORECASE,
)
# Hugging Face, OpenAI and those who write as it does, GitHub, GitLab, AWS, Google, Slack, npm, PyPI, NVIDIA,
# Databricks, W&B, Groq, Replicate, SendGrid, Stripe, Docker, DigitalOcean, Vault, Telegram; JSON web tokens; age.
TOKEN = re.compile(
    r"()(?<![\w-])(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[oprsu]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|gl(?:pat|ptt|rt|dt|cbt|soat|ft|imt|agent)-[\w.-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])"
    r"|AIza[\w-]{30,}|ya29\.[\w-]{16,}|GOCSPX-[\w-]{16,}|xox[abeoprs]-[\w-]{10,}|xapp-[\w-]{16,}|npm_[A-Za-z0-9]{30,}"
    r"|pypi-[\w-]{40,}|nvapi-[\w-]{20,}|dapi[0-9a-f]{30,}|wandb_v\d_\w{20,}|local-[0-9a-f]{40}|gsk_[A-Za-z0-9]{20,}"
    r"|r8_[A-Za-z0-9]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}|[rs]k_(?:live|test)_\w{16,}|dckr_pat_[\w-]{16,}"
    r"|do[opr]_v1_\w{32,}|hv[sbr]\.[\w-]{20,}|\d{8,10}:AA[\w-]{30,}|eyJ[\w-]{10,}\.eyJ[\w-]{4,}(?:\.[\w-]*)?"
    r"|AGE-SECRET-KEY-1\w{20,})"
)
PRIVATE_KEY = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)", re.DOTALL)
CONNECTION = re.compile(
    r"(\b(?:AccountKey|SharedAccessKey|SharedAccessSignature|Password|Pwd)=)[^;\s<>]{6,}", re.IGNORECASE
)
_FORMS = (
    (URL_PASSWORD, "a URL with a password"),
    (URL_USER, "a URL with a user or token before @"),
    (URL_QUERY, "a URL with a token or signature"),
    (HEADER, "an HTTP header that authorises"),
    (TOKEN, "a token of a known form"),
    (PRIVATE_KEY, "a private key"),
    (CONNECTION, "a connection string with a key"),
)
_ASSIGNED = re.compile(
    r"(?<![\w.-])-{0,2}([A-Za-z][\w.-]*)[=:]\s*(?=([^\s,;\"'})]{4,}))|(?<!\S)--?([A-Za-z][\w-]*)\s+(?=([^\s-]\S{3,}))"
)

_PAGE_WORD = (
    r"(?:tokens?|secret|pass|password|passwd|passphrase|pwd|credentials?|cookie|jwt"
    r"|(?:api|access|private|secret|auth|account|signing)_?key)"
)
_QUOTE = r"(?:&#34;|&#39;)?"
_NO_SECRET = r"(?!(?:[\d.,]+|null|none|true|false|warn|drop|refuse|allow)(?:\s|[&<]|$))"
# The page is looked through once it is whole, so that no section can forget to: what looks like a secret is hidden.
_ASSIGNED_IN_HTML = re.compile(rf"(?i)((?:\b|_|-){_PAGE_WORD}{_QUOTE}\s*[=:]\s*{_QUOTE}){_NO_SECRET}[^\s&<>]{{4,}}")


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting of this name holds a secret, as far as names tell."""
    return _NAME.search(name) is not None and _PLACE.search(name) is None


def is_withheld(name: str, value: str) -> bool:
    """Whether a variable is kept from Slurm's commands and from jobs, which show an environment to whoever asks.

    Wider than :func:`is_secret_name`: any part of a name counts, any address that says who may use it, and any value
    that has a secret's form.
    """
    return bool(_IN_NAME.search(name) or _ADDRESS.search(value) or secret_in(value)) or is_secret_name(name)


def secret_in(text: str) -> str | None:
    """What kind of secret ``text`` holds: words for a message that does not repeat it. None: none that is known."""
    return next((kind for form, kind in _FORMS if form.search(text)), None)


def assigned_in(text: str) -> str | None:
    """The name under which a line of shell or options gives a secret (``--token abc``, ``API_KEY=abc``)."""
    for match in _ASSIGNED.finditer(text):
        name, value = match[1] or match[3], match[2] or match[4]
        if is_secret_name(name.replace("-", "_")) and not value.startswith(("$", "/", "{")):
            return str(name)
    return None


def masked(text: str, hidden: str) -> str:
    """``text`` with ``hidden`` in the place of every secret that ``secret_in`` knows."""
    for form, _ in _FORMS:
        text = form.sub(lambda match: next((group for group in match.groups() if group), "") + hidden, text)
    return text


def masked_page(page: str, environment: Mapping[str, str], hidden: str) -> str:
    """HTML without what looks like a secret, or is the value of a variable in ``environment`` whose name does."""
    import html  # only pages need it, and everybody imports this module as a command starts

    for name, value in environment.items():
        if len(value) >= 8 and is_secret_name(name):
            page = page.replace(html.escape(value).replace("&quot;", "&#34;").replace("&#x27;", "&#39;"), hidden)
    return masked(_ASSIGNED_IN_HTML.sub(rf"\1{hidden}", page), hidden)
