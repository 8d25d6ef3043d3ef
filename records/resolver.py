"""From a name to the documents that may answer to it: package store, cache, mirrors, registry, in this order.

Nothing here is believed: a `Candidate` is bytes with an origin, and whoever asked verifies them against the name.
What held can be remembered in the cache, which is content-addressed, written atomically and safe for parallel
processes. A short number or an alias resolves to one full number, or is ambiguous.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from records import canonical
from records.document import form_of, verify_document
from records.errors import IndeterminateError, MalformedError, NetworkError, ReproError, UsageError
from records.fields import get
from records.keys import KeySet
from records.network import Client, check_url
from records.number import FULL_NUMBER, SUFFIX_LENGTH, Reference, arxiv_key
from records.report import Check, Verification

REGISTRY: Final = "https://pith.science"
STORE: Final = Path(__file__).parent / "data"
PACKAGE_SCHEMA_NOTE: Final = "a record of the package: the SHA-256 in its index is that of the file its tests validated"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A document that may be the one asked for, and where it comes from."""

    data: bytes
    origin: str
    suffix: str | None = None
    schema_known: str | None = None
    from_network: bool = False


def default_cache() -> Path:
    """`$REPRO_CACHE`, or `pith-repro` in the user's cache folder."""
    own = os.environ.get("REPRO_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pith-repro"


class PackageStore:
    """The records that come with the package, pinned by hash in data/index.json."""

    def __init__(self, folder: Path = STORE) -> None:
        self._folder = folder
        self._index = json.loads((folder / "index.json").read_bytes())

    def suffixes(self, reference: Reference) -> list[str]:
        """The full suffixes that `reference` may mean."""
        records = self._index["records"]
        if reference.kind == "pith":
            return sorted(suffix for suffix in records if suffix.startswith(reference.value))
        if reference.kind == "arxiv":
            return sorted(
                suffix
                for suffix, entry in records.items()
                if arxiv_key(entry["arxiv"]) == arxiv_key(reference.value)
                and reference.version in (None, entry["version"])
            )
        return []

    def get(self, suffix: str) -> Candidate | None:
        """The record, if it is here and has the hash that the index pins."""
        entry = self._index["records"].get(suffix)
        if entry is None:
            return None
        data = (self._folder / "records" / f"{suffix}.json").read_bytes()
        known = canonical.sha256_hex(data) == entry["sha256"]
        return Candidate(
            data=data, origin="package", suffix=suffix, schema_known=PACKAGE_SCHEMA_NOTE if known else None
        )

    def unnumbered_title(self, reference: Reference) -> str | None:
        """The title of a paper that the package knows without a number, or None."""
        if reference.kind != "arxiv":
            return None
        entry = self._index["unnumbered"].get(arxiv_key(reference.value))
        return str(entry["title"]) if entry is not None else None


class Cache:
    """What was fetched and held: `objects/` by content hash, `refs/` by suffix, `names/` from an arXiv id to suffixes.

    Every file appears whole under its name, so processes that write at once leave one of their versions.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def suffixes(self, reference: Reference) -> list[str]:
        """The full suffixes that `reference` may mean, as far as the cache knows."""
        if reference.kind == "pith":
            folder = self._folder / "refs" / reference.value[:2]
            return sorted(name for name in _listed(folder) if name.startswith(reference.value))
        if reference.kind == "arxiv":
            folder = self._folder / "names" / _file_name(arxiv_key(reference.value))
            names = [name.partition(".v") for name in _listed(folder)]
            return sorted({name for name, _, version in names if reference.version in (None, _number(version))})
        return []

    def ref(self, suffix: str) -> dict[str, Any] | None:
        """What is remembered of a number: `sha256` of its document, `url`, `valid_events` of its largest bundle."""
        try:
            value = canonical.loads((self._folder / "refs" / suffix[:2] / suffix).read_bytes())
        except (OSError, MalformedError):
            return None
        known = isinstance(value, dict) and isinstance(value.get("sha256"), str)
        return value if known and isinstance(value.get("valid_events"), int) else None

    def get(self, suffix: str) -> Candidate | None:
        """The remembered document; one whose bytes have changed on disk is as good as none."""
        ref = self.ref(suffix)
        if ref is None:
            return None
        try:
            data = (self._folder / "objects" / ref["sha256"][:2] / ref["sha256"]).read_bytes()
        except (OSError, ValueError):
            return None
        if canonical.sha256_hex(data) != ref["sha256"]:
            return None
        return Candidate(data=data, origin="cache", suffix=suffix)

    def remember(self, candidate: Candidate, suffix: str, *, valid_events: int) -> None:
        """Store a document that held; a cache that cannot be written is no error, the answer stands without it."""
        from records.package import write_atomically

        digest = canonical.sha256_hex(candidate.data)
        earlier = self.ref(suffix)
        valid_events = max(valid_events, earlier["valid_events"] if earlier else 0)
        ref = {"sha256": digest, "url": candidate.origin[:500], "valid_events": valid_events}
        source = get(canonical.loads(candidate.data, max_bytes=len(candidate.data)), "canonical_record", "source") or {}
        written: dict[Path, bytes] = {
            self._folder / "objects" / digest[:2] / digest: candidate.data,
            self._folder / "refs" / suffix[:2] / suffix: canonical.dumps(ref),
        }
        if isinstance(source.get("id"), str) and isinstance(source.get("version"), int):
            name = _file_name(arxiv_key(source["id"]))
            written[self._folder / "names" / name / f"{suffix}.v{source['version']}"] = b""
        try:
            for path, data in written.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, data)
        except (OSError, UsageError):
            return


def _listed(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return []


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else -1


def _file_name(key: str) -> str:
    """An arXiv identifier as a file name; its form was checked, so only the slash of the old ones is in the way."""
    return key.replace("/", "_")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolver:
    """Finds and checks documents; see the module's docstring for the order."""

    client: Client
    trusted: KeySet
    cache: Cache = field(default_factory=lambda: Cache(default_cache()))
    registry: str = field(default_factory=lambda: os.environ.get("REPRO_REGISTRY", REGISTRY).rstrip("/"))
    store: PackageStore = field(default_factory=PackageStore)
    refresh: bool = False
    allow_rollback: bool = False

    def verify(self, reference: Reference, *, target: str) -> Verification:
        """Verify what answers to `reference`: the first document that holds, or else the first that was found.

        Raises IndeterminateError where nothing is found or the name is ambiguous, NetworkError where the network failed
        and nothing local answers.
        """
        suffix, network_error = self._suffix(reference)
        asked = Reference(kind="pith", value=suffix, year=reference.year) if reference.kind == "pith" else reference
        first: Verification | None = None
        try:
            for candidate in self._candidates(suffix):
                found = self.check(candidate, asked=asked, target=target)
                if found.exit_code == 0:
                    return found
                first = first or found
        except NetworkError as error:
            network_error = network_error or error
        if first is not None:
            return first
        if network_error is not None and not self.client.offline:
            raise network_error
        raise IndeterminateError(self._not_found(reference))

    def check(self, candidate: Candidate, *, asked: Reference | None, target: str) -> Verification:
        """Verify one document, against rollback too, and remember it where it came over the network and holds."""
        found = verify_document(
            candidate.data,
            target=target,
            trusted=self.trusted,
            asked=asked,
            schema_known=candidate.schema_known,
            max_bytes=self.client.max_bytes,
        )
        if found.pith_number is None or not (found.kind == "pith_bundle" or candidate.from_network):
            return found
        suffix = found.pith_number[-SUFFIX_LENGTH:]
        events = _valid_events(candidate.data) if found.kind == "pith_bundle" and found.exit_code == 0 else 0
        remembered = (self.cache.ref(suffix) or {"valid_events": 0})["valid_events"]
        if found.kind == "pith_bundle" and events < remembered and not self.allow_rollback:
            detail = f"{events} valid events where {remembered} were seen before: rolled back; see --allow-rollback"
            return found.with_checks(Check(code="merge", status="fail", detail=detail))
        if candidate.from_network and found.exit_code == 0:
            self.cache.remember(candidate, suffix, valid_events=events)
        return found

    def _suffix(self, reference: Reference) -> tuple[str, NetworkError | None]:
        """The one full suffix that a name means, and what went wrong on the network while only asking for more."""
        if reference.is_full:
            return reference.value, None
        known = set(self.store.suffixes(reference)) | set(self.cache.suffixes(reference))
        error: NetworkError | None = None
        if not self.client.offline and (not known or self.refresh):
            try:
                known |= set(self._ask_registry(reference))
            except NetworkError as caught:
                error = caught
        if len(known) > 1:
            listed = ", ".join(f"pith:…:{suffix}" for suffix in sorted(known)[:5])
            raise IndeterminateError(f"{reference} is ambiguous: {listed}; use the full number")
        if known:
            return known.pop(), error
        if error is not None:
            raise error
        raise IndeterminateError(self._not_found(reference))

    def _not_found(self, reference: Reference) -> str:
        title = self.store.unnumbered_title(reference)
        where = "in the package or the cache" if self.client.offline else "in the package, the cache or the registry"
        if title is not None:
            return f"{reference} ({title}): its Pith number is not known {where}, so there is nothing to verify" + (
                "; try without --offline" if self.client.offline else ""
            )
        hint = "try without --offline" if self.client.offline else "check the number"
        return f"{reference}: no record of it {where}; {hint}"

    def _ask_registry(self, reference: Reference) -> list[str]:
        """What the registry's resolve address answers. Its form is not documented: any full number under a
        `pith_number` is taken, and the document behind it is checked against the name all the same."""
        if reference.kind == "pith":
            url = f"{self.registry}/pith/{reference.value}.json"
        else:
            name = reference.value + (f"v{reference.version}" if reference.version else "")
            url = f"{self.registry}/api/pith-number/resolve?{reference.kind}={quote(name, safe='/.:')}&json=true"
        answer = self.client.get(url)
        if answer.status != 200:
            return []
        try:
            return sorted(set(_numbers(canonical.loads(answer.body, max_bytes=self.client.max_bytes))))
        except MalformedError as error:
            raise NetworkError(f"{url} answers with something else than strict JSON: {error}") from None

    def _candidates(self, suffix: str) -> Iterator[Candidate]:
        local = (self.store.get, self.cache.get)
        if not self.refresh:
            for get in local:
                candidate = get(suffix)
                if candidate is not None:
                    yield candidate
        if not self.client.offline:
            yield from self._network_candidates(suffix)
        if self.refresh:
            for get in local:
                candidate = get(suffix)
                if candidate is not None:
                    yield candidate

    def _network_candidates(self, suffix: str) -> Iterator[Candidate]:
        error: NetworkError | None = None
        reached = False
        for url in [*self._mirror_urls(suffix), f"{self.registry}/pith/{suffix}.json",
                    f"{self.registry}/pith/{suffix}/bundle.json"]:  # fmt: skip
            try:
                answer = self.client.get(url)
            except ReproError as caught:
                error = error or (caught if isinstance(caught, NetworkError) else NetworkError(str(caught)))
                continue
            reached = True
            if answer.status == 200:
                yield Candidate(data=answer.body, origin=url, suffix=suffix, from_network=True)
        if error is not None and not reached:
            raise error

    def _mirror_urls(self, suffix: str) -> list[str]:
        """The bundle addresses of the manifest's mirrors, the registry's own last (it is asked anyway)."""
        try:
            answer = self.client.get(f"{self.registry}/pith-mirrors.json")
            value = canonical.loads(answer.body, max_bytes=self.client.max_bytes) if answer.status == 200 else None
        except (NetworkError, MalformedError):
            return []
        if value is None or form_of(value) != "mirrors":
            return []
        from records.schema import faults

        if faults("mirrors", value):
            return []
        urls: list[str] = []
        for mirror in value["mirrors"][:10]:
            url = mirror["bundle_pattern"].replace("{suffix}", suffix)
            try:
                check_url(url)
            except UsageError:
                continue  # the manifest is no authority: an address that may not be asked is left out
            if mirror.get("status") != "primary" and not url.startswith(self.registry + "/"):
                urls.append(url)
        return urls


def _numbers(value: Any) -> Iterator[str]:
    """Every suffix of a full number that stands under a `pith_number` key, at any depth."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            number = item.get("pith_number")
            if isinstance(number, str) and FULL_NUMBER.fullmatch(number):
                yield number[-SUFFIX_LENGTH:]
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _valid_events(data: bytes) -> int:
    from records.merge import merge_bundles

    return merge_bundles([canonical.loads(data)]).valid_event_count
