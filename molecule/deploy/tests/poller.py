"""Asks the webserver of this host again and again, as people and programs do: standard library only.

    poller.py PORT FILE

Each 100 ms: which state the code locations are in. Each 500 ms: a dry run of the workload's sensor, which the code
server must answer. A line for each answer is added to FILE: time, what was asked, whether all was well, what was said.
"""

import json
import sys
import threading
import time
import urllib.request

LOCATIONS = """
{ workspaceOrError { ... on Workspace { locationEntries {
    name loadStatus locationOrLoadError { __typename } displayMetadata { key value } } } } }
"""
DRY_RUN = """
mutation { sensorDryRun(selectorData: {
    repositoryLocationName: "workload", repositoryName: "__repository__", sensorName: "says"}, cursor: null) {
  __typename ... on DryRunInstigationTick { evaluationResult { skipReason error { message } } }
  ... on PythonError { message } } }
"""
LOCK = threading.Lock()


def ask(port: str, query: str) -> dict:
    """Give the answer to one request; no second try."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql",
        data=json.dumps({"query": query}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["data"]


def locations(port: str) -> tuple[bool, str]:
    """Whether all locations are loaded, and the images that are shown."""
    entries = ask(port, LOCATIONS)["workspaceOrError"]["locationEntries"]
    states = {(entry["loadStatus"], (entry["locationOrLoadError"] or {}).get("__typename")) for entry in entries}
    images = [pair["value"] for entry in entries for pair in entry["displayMetadata"] if pair["key"] == "image"]
    return states == {("LOADED", "RepositoryLocation")}, " ".join(images) if images else str(entries)


def dry_run(port: str) -> tuple[bool, str]:
    """Whether the code server evaluates the sensor, and the version that it says it has."""
    answer = ask(port, DRY_RUN)["sensorDryRun"]
    result = answer.get("evaluationResult") or {}
    return bool(result.get("skipReason")) and not result["error"], result.get("skipReason") or str(answer)


def main(port: str, path: str) -> None:
    """Ask for ever."""

    def again(name: str, question: object, interval: float) -> None:
        while True:
            asked = time.time()
            try:
                well, said = question(port)
            except Exception as error:
                well, said = False, repr(error)
            with LOCK, open(path, "a", encoding="utf-8") as file:
                print(json.dumps([asked, name, well, said]), file=file)
            time.sleep(max(0.0, interval - (time.time() - asked)))

    threading.Thread(target=again, args=("locations", locations, 0.1), daemon=True).start()
    again("dry run", dry_run, 0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
