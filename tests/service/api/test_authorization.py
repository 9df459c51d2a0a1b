"""Every operation with every id that is somebody else's: the same 404 as for an id that nobody ever had.

The table of operations is compared with the documentation, so that none can be forgotten. What the matrix is worth is
tried by taking the owner out of each query in turn: it must notice. On PostgreSQL, under the API's own login, it must
not even notice when all are taken out, because row-level security stands behind them.
"""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from sqlalchemy import make_url, select

from migrations import roles
from service import users
from service.models import Table, new_id
from service.settings import Settings
from tests.service import rows
from tests.service.belongings import CALLS, Ids, belongings
from tests.service.site import Site, open_site

# What names no object of one owner's.
NOT_OWNED = {
    "base_model_id": "the catalogue is everybody's",
    "name": "a file within an object that is asked for by its own id",
    "PUT /adapters/aliases/{alias}": "gives a new name, among one's own",
}
ID_FIELDS = {"dataset", "validation_dataset", "adapter", "adapters", "job", "user", "owner", "key", "artifact"}
WRITES = ("POST", "PUT", "PATCH", "DELETE")


@pytest.fixture
def sqlite_tenants(settings: Settings) -> Iterator[Site]:
    with open_site(settings.model_copy(update={"webhooks": True, "requests_per_second": 1e6})) as site:
        yield site


@pytest.fixture
def postgres_tenants(postgres_url: str, tmp_path: Path) -> Iterator[Site]:
    """The application under the login that production gives it, which owns no table and passes no policy."""
    roles.provision(postgres_url, "an api password of the test's", "a worker password of the test's")
    url = make_url(postgres_url).set(username=roles.API).render_as_string(hide_password=False)
    settings = Settings(data_dir=tmp_path / "data", database_url=url, webhooks=True, requests_per_second=1e6)
    with open_site(settings) as site:
        yield site


class Tenants:
    """Ann and Bob with the same belongings, and what Bob can get of Ann's."""

    def __init__(self, site: Site, folder: Path) -> None:
        rows.add_base_model(site.database, "tuned", digest="c" * 64)
        self.site, self._folder = site, folder
        self.ann = belongings(site, site.ids["ann"], folder)
        self.bob = belongings(site, site.ids["bob"], folder)
        self._names: list[tuple[str, str]] = []

    def client(self, user: str, scope: str) -> TestClient:
        with self.site.database.unit_of_work() as session:
            request = users.KeyRequest(scope=scope)  # type: ignore[arg-type]
            key = users.create_key(session, self.site.ids[user], request)
        headers = {"Authorization": f"Bearer {key}"}
        return TestClient(self.site.app, headers=headers, raise_server_exceptions=False)

    def afresh(self) -> None:
        """What Bob has is used up by operations that remove it."""
        self.bob = belongings(self.site, self.site.ids["bob"], self._folder)

    def call(self, client: TestClient, operation: str, ids: Ids, field: str | None = None, value: str = "") -> Any:
        """Make the request with `ids`; of the body, `field` is replaced by `value`."""
        call, (method, path) = CALLS[operation], operation.split()
        url = re.sub(r"\{(\w+)\}", lambda match: ids.get(match[1], rows.BASE_MODEL), path)
        if call.content is not None:
            return client.request(method, url, content=call.content, headers={"content-type": "application/jsonl"})
        body = None if call.body is None else call.body(ids)
        if field is not None:
            replace(body, field.split("."), value)
        return client.request(method, url, json=body)

    def leaks(self, operations: list[str] | None = None) -> Iterator[str]:
        """What another user's id is answered with, other than an id of nobody's is. Nothing, if all is well."""
        before = self.snapshot()
        wanted = operations or list(CALLS)
        for operation in wanted:  # before Bob's own requests put Ann's ids into his audit log
            if "{" not in operation and operation.startswith("GET"):
                yield from self._lists(operation)
        for operation in wanted:
            yield from self._slots(operation)
        if self.snapshot() != before:
            yield "something of Ann's was changed"

    def snapshot(self) -> list[str]:
        """All rows of Ann's."""
        found = list[str]()
        with self.site.database.reading() as session:
            for table in Table.metadata.sorted_tables:
                for column in ("owner_id", "user_id"):
                    if column in table.c and table.name != "audit_log":
                        shown = [item for item in table.c if item.name != "last_used_at"]
                        owned = select(*shown).where(table.c[column] == self.site.ids["ann"])
                        found += sorted(f"{table.name} {tuple(row)}" for row in session.execute(owned))
        return found

    def _slots(self, operation: str) -> Iterator[str]:
        call, parameters = CALLS[operation], re.findall(r"\{(\w+)\}", operation)
        owned = [name for name in parameters if name not in NOT_OWNED and operation not in NOT_OWNED]
        if len(owned) > 1 and (difference := self._all_theirs(operation, owned)) is not None:
            yield difference
        for parameter in owned:
            for theirs in self._foreign(parameter):
                if (difference := self._difference(operation, parameter, None, theirs)) is not None:
                    yield difference
        for field, kind in call.refers.items():
            for theirs in self._foreign(kind):
                if (difference := self._difference(operation, kind, field, theirs)) is not None:
                    yield difference

    def _all_theirs(self, operation: str, parameters: list[str]) -> str | None:
        """Ids that fit each other, all of them Ann's."""
        ids = self.bob | {name: self.ann[name] for name in parameters}
        answer = self.call(self.site.bob, operation, ids)
        return None if answer.status_code == 404 else f"{operation} with Ann's {parameters}: {answer.text}"

    def _foreign(self, parameter: str) -> list[str]:
        return [self.ann[parameter], *([self.ann["alias"]] if parameter == "adapter_id" else [])]

    def _difference(self, operation: str, parameter: str, field: str | None, theirs: str) -> str | None:
        nobodys = new_id(theirs.rpartition("-")[0])
        answers = []
        for id_ in (theirs, nobodys):
            ids = self.bob if field is not None else self.bob | {parameter: id_}
            answer = self.call(self.site.bob, operation, ids, field, id_)
            answers.append((answer.status_code, answer.text.replace(id_, "ID")))
        expected = 403 if CALLS[operation].operators else 404
        if answers[0] == answers[1] and answers[0][0] == expected:
            return None
        return f"{operation}, {field or parameter} = {theirs}: {answers}"

    def _lists(self, operation: str) -> Iterator[str]:
        path = operation.split()[1]
        for after in (None, self.ann.get(f"{path.strip('/').rstrip('s')}_id")):
            answer = self.site.bob.get(path, params={} if after is None else {"after": after})
            for name, id_ in self.ann.items():
                text = answer.text if after is None else answer.text.replace(after, "")
                if name != "name" and id_ in text:
                    yield f"{operation} tells Bob of Ann's {name}: {answer.text}"
                    return


def replace(body: Any, path: list[str], value: str) -> None:
    """The field, or in a list the first one's."""
    name, *rest = path
    target = body[name]
    if isinstance(target, list):
        if rest:
            replace(target[0], rest, value)
        else:
            target[0] = value
    else:
        body[name] = value


def operations(site: Site) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in site.app.openapi()["paths"].items()
        for method, operation in methods.items()
        if operation.get("security")
    }


def id_fields(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The fields of a JSON body that hold ids, dotted."""
    for name, value in schema.get("properties", {}).items():
        options = [value, *value.get("anyOf", []), value.get("items", {})]
        nested = [found for option in options for found in id_fields(option, f"{prefix}{name}.")]
        yield from nested
        if name in ID_FIELDS and not nested:
            yield f"{prefix}{name}"


def test_every_operation_with_every_id_is_in_the_table(sqlite_tenants: Site) -> None:
    documented = operations(sqlite_tenants)
    assert set(CALLS) == set(documented)
    known = {*belongings_names(), *NOT_OWNED}
    for name, operation in documented.items():
        assert set(re.findall(r"\{(\w+)\}", name)) <= known, name
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        assert set(id_fields(content.get("schema", {}))) == set(CALLS[name].refers), name


def belongings_names() -> set[str]:
    return {"dataset_id", "job_id", "adapter_id", "artifact_id", "key_id", "webhook_id", "delivery_id", "erasure_id",
            "user_id", "alias"}  # fmt: skip


def test_only_what_needs_no_key_is_open(sqlite_tenants: Site) -> None:
    """Of all routes that are mounted, documented or not, and of all methods."""
    sqlite_tenants.app.state.parts.gate._strangers._burst = 1e6
    client, open_ = sqlite_tenants.client(), set[str]()
    paths = {str(route.path) for route in iter_route_contexts(sqlite_tenants.app.routes) if route.path}
    assert {"/jobs/{job_id}", "/healthz"} <= paths
    for path in paths:
        for method in ("GET", "HEAD", *WRITES):
            status = client.request(method, re.sub(r"\{[\w:]+\}", "x", path)).status_code
            if status not in (401, 405):
                open_.add(path)
    documentation = {path for path in open_ if path.startswith(("/docs", "/openapi.json", "/static-offline-docs"))}
    assert open_ - documentation == {"/healthz", "/readyz"}


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_another_users_id_is_answered_as_nobodys(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tenants = Tenants(request.getfixturevalue(f"{database}_tenants"), tmp_path)
    assert list(tenants.leaks()) == []


def test_the_same_requests_with_ones_own_ids_are_not_refused(sqlite_tenants: Site, tmp_path: Path) -> None:
    """Or else the matrix would show nothing."""
    tenants = Tenants(sqlite_tenants, tmp_path)
    for operation, call in CALLS.items():
        tenants.afresh()
        answer = tenants.call(sqlite_tenants.bob, operation, tenants.bob)
        if call.operators:
            assert answer.status_code == 403, operation
        elif operation in ("GET /adapters/{adapter_id}/certificate", "POST /adapters/{adapter_id}/verify"):
            assert "not_merged" in answer.text or "certificate" in answer.text, (operation, answer.text)
        elif operation == "POST /adapters":
            assert answer.status_code == 415
        else:
            assert answer.status_code < 300 or answer.status_code == 409, (operation, answer.text)


@pytest.mark.parametrize("which", ["none", "unknown", "revoked"])
def test_without_a_live_key_every_operation_says_the_same(sqlite_tenants: Site, tmp_path: Path, which: str) -> None:
    tenants = Tenants(sqlite_tenants, tmp_path)
    sqlite_tenants.app.state.parts.gate._strangers._burst = 1e6
    client = tenants.client("ann", "admin")
    if which == "revoked":
        with sqlite_tenants.database.unit_of_work() as session:
            for key in users.keys_of(session, sqlite_tenants.ids["ann"]):
                if key.scope == "admin":
                    users.revoke_key(session, key.id)
    elif which == "unknown":
        client.headers["Authorization"] = "Bearer luthier_" + "x" * 43
    else:
        del client.headers["Authorization"]
    before = tenants.snapshot()
    answers = [tenants.call(client, operation, tenants.ann) for operation in CALLS]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert tenants.snapshot() == before


def test_a_key_for_looking_changes_nothing_anywhere(sqlite_tenants: Site, tmp_path: Path) -> None:
    tenants = Tenants(sqlite_tenants, tmp_path)
    client = tenants.client("ann", "read")
    before = tenants.snapshot()
    for operation in CALLS:
        answer = tenants.call(client, operation, tenants.ann)
        if operation.startswith(WRITES):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope"), operation
    assert tenants.snapshot() == before


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_an_operators_key_opens_operators_routes_and_nobodys_things(
    database: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tenants = Tenants(request.getfixturevalue(f"{database}_tenants"), tmp_path)
    operator = tenants.site.bob = tenants.client("bob", "admin")
    theirs = [name for name, call in CALLS.items() if not call.operators and "erasure" not in name and "{" in name]
    assert list(tenants.leaks(theirs)) == []
    for name, call in CALLS.items():
        if call.operators:
            answer = tenants.call(operator, name, tenants.ann)
            assert answer.status_code < 300, (name, answer.text)
    assert operator.get(f"/users/{tenants.ann['user_id']}").status_code in (200, 404)


# Filters whose absence changes no answer, and why.
_REDUNDANT = {
    "service.adapters._is 0": "an alias of somebody else's leads to an adapter of theirs, which comparison 1 refuses",
    "service.jobs.cancel": "`get` refuses in the same transaction",
    "service.erasure.order_user": "names whom an operator erases",
    "service.erasure._lineage": "names whose things an order erases",
    "service.quotas.running": "counts",
    "service.quotas.unfinished": "counts",
    "service.quotas._have": "counts",
    "service.quotas._sums": "counts",
    "service.quotas.may_run": "counts",
    "service.webhooks.create": "counts",
    "service.webhooks.deliveries": "`get` refuses the webhook first",
    "service.webhooks.announce": "the job's own",
    "service.adapters.by_recipe": "see test_merges: a recipe is one's own",
    "service.merges._known": "see test_merges: a recipe is one's own",
}
_MODULES = ("adapters", "artifacts", "audit", "datasets", "erasure", "jobs", "merges", "quotas", "users", "webhooks")
_OWNER = ("owner_id", "user_id")


class _WithoutOwner(ast.NodeTransformer):
    """Takes the owner out of the nth comparison with one, or out of all."""

    def __init__(self, nth: int | None) -> None:
        self.seen, self._nth = 0, nth

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        named = isinstance(node.left, ast.Attribute) and node.left.attr in _OWNER
        if not named or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
            return node
        self.seen += 1
        if self._nth is not None and self.seen - 1 != self._nth:
            return node
        always = "__import__('sqlalchemy').true()" if isinstance(node.ops[0], ast.Eq) else "False"
        return ast.copy_location(ast.parse(always, mode="eval").body, node)


def filters() -> list[tuple[str, int]]:
    """Each function that compares with an owner, and which of its comparisons."""
    found = list[tuple[str, int]]()
    for name in _MODULES:
        module = importlib.import_module(f"service.{name}")
        for function in ast.parse(inspect.getsource(module)).body:
            if isinstance(function, ast.FunctionDef):
                counter = _WithoutOwner(-1)
                counter.visit(function)
                found += [(f"service.{name}.{function.name}", nth) for nth in range(counter.seen)]
    return found


@contextmanager
def mutated(wanted: list[tuple[str, int | None]]) -> Iterator[None]:
    """The functions run without these comparisons, for the length of the block."""
    replaced = list[tuple[FunctionType, CodeType]]()
    try:
        for name, nth in wanted:
            module_name, _, function_name = name.rpartition(".")
            module = sys.modules[module_name]
            function = getattr(module, function_name)
            replaced.append((function, function.__code__))
            function.__code__ = _code(module, function_name, nth)
        yield
    finally:
        for function, code in reversed(replaced):
            function.__code__ = code


def _code(module: ModuleType, function_name: str, nth: int | None) -> CodeType:
    tree = ast.parse(inspect.getsource(module))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function_name:
            _WithoutOwner(nth).visit(node)
    code = compile(ast.fix_missing_locations(tree), str(module.__file__), "exec")
    return next(const for const in code.co_consts if isinstance(const, CodeType) and const.co_name == function_name)


def test_a_query_that_forgets_its_owner_is_noticed(sqlite_tenants: Site, tmp_path: Path) -> None:
    tenants = Tenants(sqlite_tenants, tmp_path)
    survivors = list[str]()
    names = {name for name, _ in filters()}
    assert len(names - set(_REDUNDANT)) >= 15
    for name, nth in filters():
        if name in _REDUNDANT or f"{name} {nth}" in _REDUNDANT:
            continue
        tenants.ann = belongings(sqlite_tenants, sqlite_tenants.ids["ann"], tmp_path)  # mutants use them up
        tenants.afresh()
        noun = name.split(".")[1].rstrip("s")
        by_nearness = sorted(CALLS, key=lambda operation: (noun[:5] not in operation, "DELETE" in operation))
        with mutated([(name, nth)]):
            if next(tenants.leaks(by_nearness), None) is None:
                survivors.append(f"{name}, comparison {nth}")
    assert survivors == []


def test_on_postgresql_row_security_holds_when_every_query_forgets(postgres_tenants: Site, tmp_path: Path) -> None:
    tenants = Tenants(postgres_tenants, tmp_path)
    everywhere: list[tuple[str, int | None]] = [(name, None) for name in sorted({name for name, _ in filters()})]
    with mutated([entry for entry in everywhere if "quotas" not in entry[0]]):
        assert list(tenants.leaks()) == []
