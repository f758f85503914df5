"""The README's tables, made from the code; `python -m tests.support.readme` writes them into the README."""

from pathlib import Path

from google.rpc.code_pb2 import Code

from cellserve.v1 import errors_pb2
from cellserve_service.errors import CODE_BY_REASON, reason_name
from cellserve_service.settings import ENVIRONMENT_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PROTO = ROOT / "protos" / "cellserve" / "v1" / "errors.proto"


def settings_table() -> str:
    """Every setting with its default and what it is."""
    rows = ["| setting | default | what it is |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, "") else str(field.default).lower().replace("false", "off")
        rows.append(f"| `--{name.replace('_', '-')}` | {default} | {field.description} |")
    rows.append("")
    rows.append(f"`{ENVIRONMENT_PREFIX}MAX_SESSIONS=1000` is `--max-sessions 1000`.")
    return "\n".join(rows)


def errors_table() -> str:
    """Every reason with its status code and, from the contract's comment, what it means."""
    rows = ["| reason | code | meaning |", "|---|---|---|"]
    comments = _comments()
    for reason, code in CODE_BY_REASON.items():
        meaning = comments[errors_pb2.ErrorReason.Name(reason)]
        rows.append(f"| `{reason_name(reason)}` | {Code.Name(code)} | {meaning} |")
    return "\n".join(rows)


def _comments() -> dict[str, str]:
    """What errors.proto says of each reason, without the code at the beginning."""
    comments: dict[str, str] = {}
    said: list[str] = []
    for line in PROTO.read_text().splitlines():
        text = line.strip()
        if text.startswith("//"):
            said.append(text.removeprefix("//").strip())
        elif text.startswith("ERROR_REASON_"):
            comment = " ".join(said)
            comments[text.split(" ")[0]] = comment.partition(". ")[2]
            said = []
        else:
            said = []
    return comments


def with_tables(readme: str) -> str:
    """The README's text with its tables as they must be."""
    for name, table in (("settings", settings_table()), ("errors", errors_table())):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, _, rest = readme.partition(begin)
        tail = rest.partition(end)[2] if end in rest else rest
        readme = f"{head}{begin}\n{table}\n{end}{tail}"
    return readme


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
