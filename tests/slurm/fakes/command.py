"""A stand-in for sbatch, squeue, scontrol, sacct, sinfo, scancel and srun: which one, its file's name says.

It reads and changes ``scenario.json``, a folder above itself, and writes down each call in ``calls.jsonl``.
For what a live cluster cannot be brought into: a controller that hangs, accounting that lags, a site's own limits.
"""

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

FOLDER = Path(__file__).absolute().parent.parent
NO_CONTROLLER = "Unable to contact slurm controller (connect failure)"
UNREACHED = {
    "sbatch": f"sbatch: error: Batch job submission failed: {NO_CONTROLLER}",
    "squeue": f"slurm_load_jobs error: {NO_CONTROLLER}",
    "sinfo": f"slurm_load_partitions: {NO_CONTROLLER}",
    "scancel": f"scancel: error: Kill job error on job id 0: {NO_CONTROLLER}",
    "scontrol": "Unexpected message received for job 0",
}
# What squeue prints for a job of which the scenario says no more than its state.
BLANK = {
    **{"State": "PENDING", "NodeList": "", "StartTime": "N/A", "EndTime": "N/A", "TimeLimit": "30:00"},
    **{"exit_code": "0:0", "Dependency": "(null)", "RestartCnt": "0", "PreemptTime": "N/A", "Requeue": "1"},
    **{"Reason": "None", "Name": "job"},
}
AS_SACCT = {
    "Start": "StartTime",
    "End": "EndTime",
    "Timelimit": "TimeLimit",
    "ExitCode": "exit_code",
    "JobName": "Name",
}


class Ended(Exception):
    """The command is over: (status, text for stderr)."""


def fail(text: str) -> NoReturn:
    raise Ended(1, text)


def option(words: list[str], *names: str) -> str:
    """The value of an option, ``-j 1`` or ``--jobs=1``; "" without."""
    for number, word in enumerate(words):
        if word in names:
            return words[number + 1]
        if word.partition("=")[0] in names:
            return word.partition("=")[2]
    return ""


def row(state: dict[str, Any], job: str) -> dict[str, str]:
    return {"JobID": job, **BLANK, **state["jobs"][job]}


def advance(state: dict[str, Any], job: str) -> None:
    """Put a job into the next state that its script has for it; the last one stays."""
    script = state["scripts"].get(job, [])
    if script:
        state["jobs"][job].update(script.pop(0))


def squeue(words: list[str], state: dict[str, Any]) -> str:
    named = option(words, "-n", "--name")
    if named:  # those that wait or run
        asked = [job for job in state["jobs"] if row(state, job)["Name"] == named and job not in state["forgotten"]]
        asked = [job for job in asked if row(state, job)["State"] in ("PENDING", "RUNNING")]
    else:
        asked = option(words, "-j", "--jobs").split(",")
    for job in [] if named else asked:
        advance(state, job)
    known = [job for job in asked if job in state["jobs"] and job not in state["forgotten"]]
    if not known and len(asked) == 1 and not named:
        fail("slurm_load_jobs error: Invalid job id specified")
    columns = [column.partition(":") for column in option(words, "-O", "--Format").split(",")]
    return "".join("".join(row(state, job)[name] + end for name, _, end in columns) + "\n" for job in known)


def sacct(words: list[str], state: dict[str, Any]) -> str:
    if state["accounting"] == "disabled":
        fail("Slurm accounting storage is disabled")
    if state["accounting"] == "down":
        fail("sacct: error: Problem talking to the database: Connection refused")
    if state["lag"] > 0:
        state["lag"] -= 1
        return ""
    names = option(words, "-o", "--format").split(",")
    jobs = [row(state, job) for job in option(words, "-j", "--jobs").split(",") if job in state["jobs"]]
    cells = ([job["JobID"] if name == "JobIDRaw" else job[AS_SACCT.get(name, name)] for name in names] for job in jobs)
    return "".join("|".join(each) + "\n" for each in cells)


def sbatch(words: list[str], state: dict[str, Any]) -> str:
    test, job = "--test-only" in words, str(state["next"])
    state["next"] += 1
    if state["refuses"] and state["accepts"] <= 0:
        fail(f"{'allocation failure' if test else 'sbatch: error: Batch job submission failed'}: {state['refuses']}")
    if test:
        raise Ended(
            0, f"sbatch: Job {job} to start at 2026-11-23T10:42:19 using 8 processors on nodes n1 in partition x"
        )
    state["accepts"] -= 1
    state["jobs"][job] = {"Name": option(words, "-J", "--job-name") or "job"}
    return f"{job}{state['cluster']}\n"


def scancel(words: list[str], state: dict[str, Any]) -> str:
    errors, signal = [], option(words, "-s", "--signal")
    for job in (word for word in words if word.isdigit()):
        if job not in state["jobs"] and signal:
            errors.append(f"scancel: error: Kill job error on job id {job}: Invalid job id specified")
        elif job in state["foreign"]:
            errors.append(f"scancel: error: Kill job error on job id {job}: Access/permission denied")
        elif job in state["jobs"] and not signal:
            state["jobs"][job].update(State="CANCELLED", exit_code="0:15")
    if errors:
        fail("\n".join(errors))
    return ""


def scontrol(words: list[str], state: dict[str, Any]) -> str:
    if words[0] != "update":
        fail(f"invalid keyword: {words[0]}")
    fields = dict(word.split("=", 1) for word in words[1:])
    if fields["JobId"] not in state["jobs"]:
        fail(f"Invalid job id specified for job {fields['JobId']}")
    return ""


def sinfo(words: list[str], state: dict[str, Any]) -> str:
    if "--version" in words:
        return f"{state['version']}\n"
    return str(state["nodes"] if "-N" in words else state["partitions"])


def answer(program: str, words: list[str], state: dict[str, Any]) -> str:
    if "--version" not in words:
        time.sleep(state["delay"])
        if state["away"] > 0 and program in UNREACHED:  # the controller comes back after so many calls
            state["away"] -= 1
            fail(UNREACHED[program])
        if state["controller"] == "down" and program in UNREACHED:  # sacct asks another daemon
            fail(UNREACHED[program])
    does = (sbatch, squeue, sacct, scancel, scontrol, sinfo)
    return next((each(words, state) for each in does if each.__name__ == program), "")


def main() -> int:
    program, words = Path(sys.argv[0]).name, sys.argv[1:]
    status, out, err = 0, "", ""
    with (FOLDER / "scenario.json").open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        state = json.load(file)
        call = {"program": program, "argv": words, "env": dict(os.environ), "stdin": sys.stdin.read()}
        with (FOLDER / "calls.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(call) + "\n")
        try:
            out = answer(program, words, state)
        except Ended as end:
            status, err = end.args
        file.seek(0)
        file.truncate()
        json.dump(state, file)
    sys.stdout.write(state["notice"] + out)
    sys.stderr.write(state["notice"] + (f"{err}\n" if err else ""))
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
