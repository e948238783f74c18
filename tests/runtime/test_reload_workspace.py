"""What makes the webserver read its workspace again, against a server that answers as Dagster's does."""

import pytest
from conftest import Webserver, free_port
from data_platform_runtime import reload_workspace as reload

SAYS = "The workspace was not read again: "


@pytest.fixture
def main_asks(webserver: Webserver, monkeypatch: pytest.MonkeyPatch) -> Webserver:
    """The server that the program takes for the webserver."""
    ask = reload.reload_workspace
    monkeypatch.setattr(reload, "reload_workspace", lambda: ask(webserver.server_port))
    return webserver


def test_webserver_is_asked_once(main_asks: Webserver, capsys: pytest.CaptureFixture) -> None:
    main_asks.says("reloadWorkspace", {"__typename": "Workspace"})
    assert reload.main() == 0
    assert main_asks.asked == [("/graphql", reload.RELOAD)]
    assert capsys.readouterr() == ("", "")


def test_question_and_answer_are_those_of_dagsters_webserver() -> None:
    from dagster_graphql.schema import create_schema
    from graphql import get_named_type, parse, validate

    schema = create_schema().graphql_schema
    assert validate(schema, parse(reload.RELOAD)) == []
    answers = get_named_type(schema.mutation_type.fields["reloadWorkspace"].type).types
    assert {"Workspace", "PythonError"} <= {answer.name for answer in answers}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"__typename": "PythonError", "message": "load_from is missing"}, "load_from is missing"),
        ({"__typename": "UnauthorizedError"}, "UnauthorizedError"),
        ({}, "reloadWorkspace"),
        (None, "reloadWorkspace"),
    ],
)
def test_refusal_is_told_in_one_sentence(
    answer: object, reason: str, main_asks: Webserver, capsys: pytest.CaptureFixture
) -> None:
    main_asks.says("reloadWorkspace", answer)
    assert reload.main() == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{SAYS}the webserver refuses: ")
    assert reason in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "text", "reason"),
    [
        (500, "{}", "HTTP Error 500"),
        (502, "<html>", "HTTP Error 502"),
        (200, "<html>", "does not answer"),
        (200, "", "does not answer"),
        (200, '{"data": null, "errors": [{"message": "no such field"}]}', "no such field"),
    ],
)
def test_answer_that_makes_no_sense_is_no_success(
    status: int, text: str, reason: str, main_asks: Webserver, capsys: pytest.CaptureFixture
) -> None:
    main_asks.status, main_asks.text = status, text
    assert reload.main() == 1
    said = capsys.readouterr().err
    assert said.startswith(SAYS)
    assert reason in said
    assert len(said.splitlines()) == 1


def test_webserver_that_is_not_there_is_named() -> None:
    port = free_port()
    with pytest.raises(RuntimeError, match=f"the webserver does not answer on port {port}: .*refused"):
        reload.reload_workspace(port)


def test_webserver_that_never_answers_is_not_waited_for(webserver: Webserver, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    monkeypatch.setattr(reload, "TIMEOUT", 0.05)
    monkeypatch.setattr(webserver, "process_request", lambda *request: kept.append(request))
    with pytest.raises(RuntimeError, match="timed out"):
        reload.reload_workspace(webserver.server_port)
