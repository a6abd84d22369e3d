"""Runs of fake stages, in a launcher of their own: how a run is stopped, killed, resumed and refused."""

import os
import signal
from pathlib import Path

import pytest

from galley.contract.rundir import RunDir
from galley_launch.base import locks
from launch import fakes

# Trains until it is asked to stop, then saves.
POLITE = """
step(1); (attempt / 'logs' / 'rank-0.log').write_text('step 1\\n')
wait(lambda: (attempt / 'ctl' / 'stop').exists())
leave('stopped', 1, json.loads((attempt / 'ctl' / 'stop').read_text())['reason'])
"""
# A torchrun of sorts: a rank in a session of its own, which outlives a polite request.
STUBBORN = """
import subprocess
child = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print("up", flush=True); time.sleep(60)'
rank = subprocess.Popen([sys.executable, '-c', child], start_new_session=True, stdout=subprocess.PIPE)
rank.stdout.readline()
(run / 'rank.pid').write_text(str(rank.pid))
step(1)
rank.wait()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "x")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_ends_well_and_says_where_things_are(run: RunDir) -> None:
    launcher = fakes.launch(run.root, prepare="print('42 documents')")
    out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, err) == (0, "")
    assert "42 documents" in out
    assert f"model in {run.export / 'model'}" in out
    assert fakes.verdict(run.attempt(1))["verdict"] == "done"
    assert not locks.is_live(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_saves_and_stops(run: RunDir, number: int) -> None:
    launcher = fakes.launch(run.root, train=POLITE)
    fakes.wait_for(run.metrics.exists)
    assert locks.is_live(run)
    launcher.send_signal(number)
    out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, err) == (0, "")
    assert "\nstep 1\n" in out
    assert "saving and stopping once this step is done; Ctrl-C again to end now" in out
    assert "stopped at step 1 (user); run the same command again to go on" in out
    assert not run.export.exists()


def test_the_second_interrupt_ends_every_rank(run: RunDir) -> None:
    launcher = fakes.launch(run.root, train=STUBBORN)
    fakes.wait_for(run.metrics.exists)
    rank = int((run.root / "rank.pid").read_text())
    launcher.send_signal(signal.SIGINT)
    fakes.wait_for(run.attempt(1).stop.exists)
    launcher.send_signal(signal.SIGINT)
    out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, err) == (130, "")
    assert "run the same command again to go on" in out
    assert not alive(rank)
    assert fakes.verdict(run.attempt(1))["verdict"] == "stopped"


def test_an_interrupt_ends_prepare_at_once(run: RunDir) -> None:
    launcher = fakes.launch(run.root, prepare="print('reading', flush=True); time.sleep(60)")
    fakes.wait_for(lambda: "reading" in (launcher.stdout.readline() if launcher.stdout else ""))
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert not run.metrics.exists()
    assert fakes.verdict(run.attempt(1))["reason"] == "user"


def test_a_hangup_and_a_dead_terminal_do_not_end_a_run(run: RunDir) -> None:
    patient = "step(1)\nfor n in range(40): print(n, flush=True); time.sleep(0.02)\n" + fakes.GOOD_TRAIN
    launcher = fakes.launch(run.root, train=patient)
    fakes.wait_for(run.metrics.exists)
    launcher.send_signal(signal.SIGHUP)
    for stream in (launcher.stdout, launcher.stderr):
        assert stream is not None
        stream.close()
    assert launcher.wait(timeout=60) == 0
    assert (run.export / "export.json").exists()


def test_a_users_mistake_is_one_line_and_status_2(run: RunDir) -> None:
    launcher = fakes.launch(run.root, prepare="fail('prepare', 2, 'data.jsonl:3: no messages; add them')")
    _, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, err) == (2, "galley: data.jsonl:3: no messages; add them\n")
    assert fakes.verdict(run.attempt(1))["verdict"] == "failed"
    assert not run.metrics.exists()


def test_a_failed_rank_is_named_with_its_log(run: RunDir) -> None:
    failing = "(attempt / 'logs' / 'rank-1.log').write_text('…'); fail('rank-1', 1, 'ValueError: no')"
    launcher = fakes.launch(run.root, train=failing)
    _, err = launcher.communicate(timeout=60)
    log = run.attempt(1).log("rank-1")
    assert (launcher.returncode, err) == (1, f"galley: run x: train failed in rank-1: ValueError: no; see {log}\n")


def test_a_killed_rank_is_named(run: RunDir) -> None:
    summary = "  rank      : 1 (local_rank: 1)\\n  exitcode  : -9 (pid: 7)"
    launcher = fakes.launch(run.root, train=f"print('{summary}'); fail('rank-0', 1, 'Connection closed by peer')")
    _, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, err) == (
        1,
        "galley: run x: rank 1 was killed by signal 9; run the same command again to resume\n",
    )


TERMINATED = (
    "  rank      : 1 (local_rank: 1)\\n  exitcode  : 1 (pid: 8)\\n"
    "Root Cause (first observed failure):\\n  rank      : 0 (local_rank: 0)\\n  exitcode  : -15 (pid: 7)"
)


def test_a_rank_that_somebody_sent_sigterm_is_named(run: RunDir) -> None:
    gone = "RuntimeError: [/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:43"
    launcher = fakes.launch(run.root, train=f"print('{TERMINATED}'); fail('rank-1', 1, '{gone}')")
    _, err = launcher.communicate(timeout=60)
    what = "rank 0 was ended by signal 15 (SIGTERM), which neither galley nor torchrun sent"
    assert (launcher.returncode, err) == (1, f"galley: run x: {what}; run the same command again to resume\n")


def test_torchrun_that_somebody_sent_sigterm_is_named(run: RunDir) -> None:
    last = "torch.distributed.elastic.multiprocessing.api.SignalException: Process 7 got signal: 15"
    launcher = fakes.launch(run.root, train=f"print('Traceback\\n{last}'); sys.exit(1)")
    _, err = launcher.communicate(timeout=60)
    what = "train was ended by signal 15, which galley did not send"
    assert (launcher.returncode, err) == (1, f"galley: run x: {what}; run the same command again to resume\n")


def test_a_rank_that_torchrun_ended_is_not_blamed(run: RunDir) -> None:
    launcher = fakes.launch(run.root, train=f"print('{TERMINATED}'); fail('rank-1', 1, 'ValueError: no')")
    _, err = launcher.communicate(timeout=60)
    assert "train failed in rank-1: ValueError: no" in err


def test_a_killed_stage_is_named(run: RunDir) -> None:
    launcher = fakes.launch(run.root, train="os.kill(os.getpid(), signal.SIGKILL)")
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert "train was killed by signal 9 (SIGKILL); run the same command again to resume" in err


def test_stages_that_outlive_their_launcher_keep_the_run(run: RunDir) -> None:
    launcher = fakes.launch(run.root, train="step(1); (run / 'pid').write_text(str(os.getpid())); time.sleep(60)")
    fakes.wait_for((run.root / "pid").exists)
    stage = int((run.root / "pid").read_text())
    launcher.kill()
    launcher.communicate(timeout=60)
    try:
        assert locks.is_live(run)
        second = fakes.launch(run.root)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        holder = f"pid {launcher.pid}, host {os.uname().nodename}"
        todo = f"galley stop {run.root} ends it, then try again"
        assert err == f"galley: {run.root}: in use by a live run ({holder}); {todo}\n"
    finally:
        os.kill(stage, signal.SIGKILL)
