"""A mirror of records as a static site, which any web server can host and `repro verify https://…` accepts.

Its addresses are the registry's: `pith/SUFFIX.json`, `pith/SUFFIX/bundle.json`, `pith/SUFFIX/state.json`,
`.well-known/pith/SUFFIX/bundle.json` and `pith-mirrors.json` with the mirror's key; beside them a page a number for
people, and the replications that the mirror holds, side by side. The same records, replications and key give the same
bytes.
"""

import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from records import canonical
from records.document import form_of, verify_value
from records.errors import InvalidError, UsageError
from records.keys import KeySet, PublicKey, fingerprint
from records.merge import MERGE_VERSION, merge_bundles
from records.network import check_url
from records.number import SUFFIX_LENGTH
from records.replication import SideBySide
from records.report import Verification

CONTENT_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE: Final = """
:root{color-scheme:light dark;--line:#8885;--pass:#1a7f37;--fail:#c2242c;--skip:#777}
@media (prefers-color-scheme:dark){:root{--pass:#4ac26b;--fail:#ff7b72;--skip:#999}}
body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;line-height:1.25;margin-bottom:.25rem}h2{font-size:1.1rem;margin-top:2rem}
code{font:.85em ui-monospace,monospace;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:.35rem
.6rem;border-bottom:1px solid var(--line)} td{overflow-wrap:anywhere}.code,.code code{white-space:nowrap;overflow-wrap:normal}
.pass{color:var(--pass)}.fail{color:var(--fail)}.skip{color:var(--skip)}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What a mirror holds of one number: a record or bundle document as parsed, and its replications by file name."""

    document: dict[str, Any]
    replications: Mapping[str, bytes] = field(default_factory=dict)
    compared: SideBySide | None = None


def build_site(
    pages: Iterable[Page], *, key: PublicKey, trusted: KeySet, base_url: str, name: str, generated_at: str
) -> dict[str, bytes]:
    """The files of the site by path. `base_url` is where it will be hosted, `generated_at` a UTC time.

    Raises InvalidError for a document that does not hold: a mirror spreads nothing that it could not verify.
    """
    base_url = check_url(base_url).rstrip("/")
    site: dict[str, bytes] = {}
    index: list[tuple[str, str, str]] = []
    for page in pages:
        found = verify_value(page.document, target="mirror", trusted=trusted)
        if found.exit_code != 0 or found.pith_number is None:
            reasons = "; ".join(check.detail for check in found.checks if check.status == "fail") or found.state
            raise InvalidError(f"a document for the mirror does not hold: {reasons}")
        suffix = found.pith_number[-SUFFIX_LENGTH:]
        folder = f"pith/{suffix}"
        if f"{folder}/bundle.json" in site:
            raise UsageError(f"two documents for {found.pith_number}; a mirror holds one")
        bundle = page.document if form_of(page.document) == "bundle" else bundle_of(page.document, found.pith_number)
        data = json.dumps(bundle, ensure_ascii=False, indent=1).encode("utf-8") + b"\n"
        site[f"{folder}/bundle.json"] = site[f".well-known/{folder}/bundle.json"] = data
        site[f"{folder}/state.json"] = merge_bundles([bundle], trusted=trusted).to_bytes() + b"\n"
        if form_of(page.document) == "record":
            site[f"{folder}.json"] = canonical.dumps(page.document) + b"\n"
        for file, content in sorted(page.replications.items()):
            site[f"{folder}/replications/{file}"] = content
        if page.compared is not None:
            site[f"{folder}/replications.json"] = canonical.dumps(page.compared.to_json()) + b"\n"
        title = _title(page.document, suffix)
        site[f"{folder}/index.html"] = _number_page(page, found, title, base_url)
        index.append((found.pith_number, title, found.state))
    if not index:
        raise UsageError("a mirror needs at least one record; none was given")
    site["pith-mirrors.json"] = canonical.dumps(_manifest(key, base_url, name, generated_at)) + b"\n"
    site["pith-signing-key.json"] = canonical.dumps(key.to_json()) + b"\n"
    site["index.html"] = _index_page(sorted(index), name, key, generated_at)
    return site


def bundle_of(document: Mapping[str, Any], number: str) -> dict[str, Any]:
    """A bundle.json around a record document, with its fields in the registry's order.

    Its one event is made of the document's own receipt. It carries no event id and no event signature, for their rule
    is not public; the receipt inside is the registry's and verifies.
    """
    record = document["canonical_record"]
    payload = {"canonical_record": record, "canonical_sha256": canonical.digest(record)}
    receipt = document.get("receipt")
    if receipt is not None:
        payload["receipt"] = receipt
    event: dict[str, Any] = {
        "event_type": "record_created",
        "subject_pith_number": number,
        "target": "record",
        "payload": payload,
    }
    if isinstance(receipt, dict) and "signed_at" in receipt:
        event["created_at"] = receipt["signed_at"]
    events = [event]
    if isinstance(document.get("graph_snapshot"), dict):
        graph = {**event, "event_type": "graph_snapshot", "target": "graph"}
        events.append({**graph, "payload": {"graph_snapshot": document["graph_snapshot"]}})
    return {
        "bundle_type": "pith_open_graph_bundle",
        "bundle_version": "1.0",
        "pith_number": number,
        "short_pith_number": f"pith:{number[-SUFFIX_LENGTH:][:8]}",
        "canonical_record": record,
        "canonical_sha256": payload["canonical_sha256"],
        "source": record["source"],
        "source_aliases": document.get("aliases", document.get("source_aliases", [])),
        "events": events,
    }


def _manifest(key: PublicKey, base_url: str, name: str, generated_at: str) -> dict[str, Any]:
    return {
        "manifest_type": "pith_mirror_manifest",
        "manifest_version": "1.0",
        "generated_at": generated_at,
        "merge_version": MERGE_VERSION,
        "mirrors": [
            {
                "name": name,
                "mirror_type": "https",
                "base_url": base_url,
                "bundle_pattern": f"{base_url}/pith/{{suffix}}/bundle.json",
                "state_pattern": f"{base_url}/pith/{{suffix}}/state.json",
                "well_known_pattern": f"{base_url}/.well-known/pith/{{suffix}}/bundle.json",
                "public_key": {
                    **key.to_json(),
                    "public_key_hex": key.raw.hex(),
                    "url": f"{base_url}/pith-signing-key.json",
                },
                "status": "mirror",
            }
        ],
        "notes": "An unofficial mirror. Its key vouches for its own replications, not for the registry's records: check those.",
    }


def _title(document: Mapping[str, Any], suffix: str) -> str:
    paper = document.get("paper")
    title = paper.get("title") if isinstance(paper, dict) else document.get("title")
    return title if isinstance(title, str) else f"pith:{suffix[:8]}"


def _number_page(page: Page, found: Verification, title: str, base_url: str) -> bytes:
    """The page of one number; every text from a document is escaped, and nothing is loaded from elsewhere."""
    number = found.pith_number or ""
    suffix, source = number[-SUFFIX_LENGTH:], page.document["canonical_record"]["source"]
    rows = "".join(
        f'<tr><td class="{check.status}">{check.status}</td><td class="code"><code>{check.code}</code></td>'
        f"<td>{_e(check.detail)}</td></tr>"
        for check in found.checks
    )
    parts = [
        f"<p><code>{_e(number)}</code> · arXiv:{_e(str(source['id']))} v{_e(str(source['version']))} · "
        f"<strong>{_e(found.state)}</strong></p>",
        f"<h2>Check it yourself</h2><p><code>repro verify {_e(base_url)}/pith/{suffix}/bundle.json</code></p>",
        '<p><a href="bundle.json">bundle.json</a> · <a href="state.json">state.json</a></p>',
        "<h2>What this mirror found</h2><table><thead><tr><th>result<th>check<th>detail</thead>"
        f"<tbody>{rows}</tbody></table>",
    ]
    if page.compared is not None:
        parts.append(_replications_table(page.compared))
    if page.replications:
        links = " · ".join(f'<a href="replications/{_e(name)}">{_e(name)}</a>' for name in sorted(page.replications))
        parts.append(f"<p>{links}</p>")
    return _html(title, "".join(parts))


def _replications_table(compared: SideBySide) -> str:
    rows = "".join(
        f"<tr><td><code>{_e(claim.claim)}</code></td><td>{_e(claim.summary())}</td><td>"
        + "<br>".join(f"{_e(v.verdict)} at {_e(v.scale)} <code>{_e(v.signer)}</code>" for v in claim.verdicts)
        + "</td></tr>"
        for claim in compared.claims
    )
    return (
        f"<h2>Replications, side by side ({compared.count})</h2><p>Typed annotations, not peer review. Conflicting verdicts "
        f"are kept.</p><table><thead><tr><th>claim<th>together<th>each</thead><tbody>{rows}</tbody></table>"
    )


def _index_page(entries: list[tuple[str, str, str]], name: str, key: PublicKey, generated_at: str) -> bytes:
    rows = "".join(
        f'<tr><td><a href="pith/{number[-SUFFIX_LENGTH:]}/"><code>{_e(number)}</code></a></td><td>{_e(title)}</td>'
        f'<td class="pass">{_e(state)}</td></tr>'
        for number, title, state in entries
    )
    body = (
        f"<p>An unofficial mirror of Pith records, built {_e(generated_at)}. Its key: <code>{_e(key.key_id)}</code>, "
        f'<code>{fingerprint(key.raw)}</code> (<a href="pith-signing-key.json">JSON</a>, '
        '<a href="pith-mirrors.json">manifest</a>).</p>'
        f"<table><thead><tr><th>number<th>paper<th>state</thead><tbody>{rows}</tbody></table>"
    )
    return _html(name, body)


def _html(title: str, body: str) -> bytes:
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_e(title)}</title><style>{_STYLE}</style></head><body><h1>{_e(title)}</h1>{body}</body></html>\n"
    )
    return page.encode("utf-8")


def _e(text: str) -> str:
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))
