"""Grading that nothing can stop: hanging, crashing, raising and lying graders, done for real in real processes.

Mistake 26 of the field: Math-Verify's SIGALRM in a thread makes every reward 0 in silence, and without a limit one
answer hangs the run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tenbit.tasks.grading import ExactGrader, Grade, Grader, MathGrader, open_grader
from tenbit.types import Problem

USERS = '''
import os, sys, time, math, signal, ctypes, subprocess

def by_length(problem, text):
    return len(text) / 10

def behave(problem, text):
    """Does what the text says."""
    print("a grader may print")
    if text == "hang":
        while True:
            pass
    if text == "sleep":
        time.sleep(1000)
    if text == "exit":
        os._exit(1)
    if text == "quit":
        sys.exit(3)
    if text == "raise":
        raise KeyError("no such thing")
    if text == "segfault":
        ctypes.string_at(0)
    if text == "hold":
        pow(3, 10 ** 9)  # one C call that never lets another thread run
    if text == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        os._exit(7)
    if text == "alarm":
        signal.signal(signal.SIGALRM, lambda *a: None)
        signal.alarm(1)
        time.sleep(0.01)
    if text == "pid":
        return float(os.getpid())
    return 1.0 if text == problem.answer else 0.0

def odd(problem, text):
    return {"nan": math.nan, "inf": -math.inf, "none": None, "text": "1.0", "true": True, "big": 10 ** 400}[text]

def fields(problem, text):
    assert (problem.prompt, problem.answer, problem.id) == ("q", "right", "a.jsonl:1"), problem
    assert "torch" not in sys.modules
    return 1.0

class Rewards:
    @staticmethod
    def nested(problem, text):
        return 0.25

def patient(problem, text):
    time.sleep(0.2)
    return 1.0

not_a_function = 3
'''


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A module of graders, importable from the folder that the run starts in."""
    (tmp_path / "graders_of_mine.py").write_text(USERS)
    (tmp_path / "broken_of_mine.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problem(answer: str = "right", number: int = 1) -> Problem:
    return Problem("q", answer, f"a.jsonl:{number}")


def ask(grader: Grader, *texts: str, answer: str = "right") -> list[Grade]:
    return grader.grade([(problem(answer, n), text) for n, text in enumerate(texts, 1)])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def gone(pids: list[int], within: float) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


# --- what a grade is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        (r"so \boxed{204}.", True),
        (r"\boxed{ 0204 }", True),
        (r"\boxed{204.0}", True),
        (r"\boxed{\text{204}}", True),
        (r"first \boxed{204}, no: \boxed{205}", False),
        (r"first \boxed{205}, no: \boxed{204}", True),
        (r"\boxed{204} and then \boxed{20", True),  # the last box was never closed
        (r"\boxed{\frac{204}{1}}", False),  # exact means exact
        ("204", False),
        ("The answer is 204.", False),
        (r"\boxed{}", False),
        (r"\boxed{204", False),
        ("", False),
    ],
)
def test_exact_looks_at_the_last_closed_box_only(text, correct):
    with open_grader("exact") as grader:
        assert ask(grader, text, answer="204") == [Grade(float(correct), correct)]


def test_exact_compares_text_as_typeset():
    with ExactGrader() as grader:
        assert ask(grader, r"\boxed{\left( 3,\dfrac{\pi}{2} \right)}", answer=r"(3, \frac{\pi}{2})")[0].correct
        assert ask(grader, r"\boxed{\$18.90}", answer="18.90")[0].correct
        assert ask(grader, r"\boxed{10,\!080}", answer="10080")[0].correct
        assert ask(grader, r"\boxed{\{1, 2\}}", answer=r"\{1,2\}")[0].correct
        assert not ask(grader, r"\boxed{1 1/2}", answer="11/2")[0].correct
        assert not ask(grader, r"\boxed{(1,080)}", answer="1080")[0].correct


MATH = [
    ("204", r"\boxed{204}", True),
    ("204", "Answer: 204", True),
    ("204", "**Answer:** $204$", True),
    ("204", "<think>\\boxed{1}</think> <answer> 204 </answer>", True),
    ("204", r"\boxed{204}</think> so \boxed{205}", False),
    ("204", r"\boxed{204}</think> I do not know", False),  # a thought is not an answer
    ("204", "it is 204", False),
    (r"\frac{1}{2}", r"\boxed{0.5}", True),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", True),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", False),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", True),
    ("x=5", r"\boxed{5}", True),
    ("1,-2", r"\boxed{-2, 1}", True),
    ("(3,4]", r"\boxed{[3,4]}", False),
    ("(6,31,-1)", r"\boxed{(6,-1,31)}", False),
    (r"10\%", r"\boxed{10}", True),
    (r"864 \mbox{ inches}^2", r"\boxed{864}", True),
    (r"\text{Evelyn}", r"\boxed{Evelyn}", True),
    (r"\text{(C)}", r"\boxed{C}", True),
    ("4.5e33", r"\boxed{4.5 \times 10^{33}}", True),
    ("4.5e33", r"\boxed{4.5 \times 10^{32}}", False),
    (r"4.5e33 \text{ erg}", r"\boxed{4.5 \times 10^{33}}", True),
    (r"3.61 \times 10^{-10}", r"\boxed{3.62 \times 10^{-10}}", False),  # rounded to six decimals they agree
    (r"\frac{1}{2^{98}}", r"\boxed{\frac{2}{2^{98}}}", False),
    (r"\frac{1}{2^{98}}", r"\boxed{2^{-98}}", True),
    ("0.01 ||| 0.02", r"\boxed{0.02}", True),
    ("0.01 ||| 0.02", r"\boxed{0.03}", False),
    (r"Thus \boxed{\frac12}.", r"\boxed{0.5}", True),  # a whole solution as the answer: MATH's
    ("3 + 4 = 7 #### 7", r"\boxed{7}", True),  # and GSM8K's
]


@pytest.fixture(scope="module")
def math():
    with open_grader("math", timeout=60) as grader:
        yield grader


def test_math_in_one_call_and_in_order(math):
    grades = math.grade([(problem(answer), text) for answer, text, _ in MATH])
    assert [(a, t, g.correct) for (a, t, _), g in zip(MATH, grades, strict=True)] == MATH
    assert all(g.reward == float(g.correct) and g.failure is None for g in grades)
    assert math.failures == Counter()


@pytest.mark.parametrize(
    "text",
    [r"\boxed{" * 30_000, "{" * 300_000, r"\text{" * 30_000, "\n" * 300_000, "<answer>" * 30_000, "answer:" * 30_000],
    ids=lambda text: text[:8],
)
def test_a_babbling_model_costs_no_time(math, text):
    before = time.process_time()
    assert not ask(math, text, text + r"\boxed{" + text, answer="204")[0].correct
    assert time.process_time() - before < 2.0


# --- what goes wrong in workers ---------------------------------------------------------------------------------


def test_a_hang_a_crash_and_an_exception_are_wrong_answers_and_the_rest_is_graded(users):
    texts = ["right", "hang", "right", "exit", "wrong", "raise", "segfault", "right", "quit", "sleep", "right"]
    with open_grader("graders_of_mine:behave", workers=2, timeout=1.5, failed_reward=-1.0) as grader:
        grades = ask(grader, *texts)
        kinds = {
            "hang": "timeout",
            "sleep": "timeout",
            "exit": "crash",
            "segfault": "crash",
            "raise": "error",
            "quit": "error",
        }
        for text, grade in zip(texts, grades, strict=True):
            if text in kinds:
                assert grade.failure is not None
                assert grade.failure.startswith(kinds[text] + ": "), grade
                assert (grade.reward, grade.correct) == (-1.0, False)
            else:
                assert grade == Grade(float(text == "right"), text == "right")
        assert grader.failures == Counter(timeout=2, crash=2, error=2)
        said = {text: grade.failure or "" for text, grade in zip(texts, grades, strict=True)}
        assert "exit status 1" in said["exit"]
        assert "SIGSEGV" in said["segfault"]
        assert "graders_of_mine.py" in said["segfault"]  # the worker's last words: where it was
        assert "KeyError: 'no such thing' (graders_of_mine.py:" in said["raise"]
        assert ask(grader, "right")[0].correct  # and it goes on


def test_code_that_never_yields_is_killed_in_time(users):
    with open_grader("graders_of_mine:behave", workers=1, timeout=1.0) as grader:
        began = time.monotonic()
        grades = ask(grader, "hold", "right")
        assert [g.correct for g in grades] == [False, True]
        assert time.monotonic() - began < 60
        assert grader.failures == Counter(timeout=1)


def test_math_verify_hanging_is_a_wrong_answer():
    towers = [r"\boxed{9^{9^{9^{9^{9}}}}}", r"\boxed{3}", r"\boxed{\frac{10}{2}}"]
    with MathGrader(workers=1, timeout=3.0) as grader:
        grades = ask(grader, *towers, answer="5")
        assert [g.correct for g in grades] == [False, False, True]
        assert sum(grader.failures.values()) == 1


def test_a_worker_killed_from_outside_costs_its_own_item_only(users):
    with open_grader("graders_of_mine:patient", workers=2, timeout=60) as grader:
        victims: list[int] = []

        def kill():
            time.sleep(0.5)
            victims.extend(grader._pool.pids()[:1])
            os.kill(victims[0], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        grades = ask(grader, *["x"] * 20)
        thread.join()
        lost = [g for g in grades if g.failure]
        assert len(lost) == 1
        assert "SIGKILL" in (lost[0].failure or "")
        assert sum(g.reward for g in grades) == 19
        assert grader.failures == Counter(crash=1)
        # killed while idle, it is replaced and nothing is lost
        for pid in grader._pool.pids():
            os.kill(pid, signal.SIGKILL)
        assert gone(grader._pool.pids(), 10)
        assert [g.reward for g in ask(grader, *["x"] * 4)] == [1.0] * 4


def test_children_of_a_worker_die_with_it(users):
    with open_grader("graders_of_mine:behave", workers=1, timeout=30) as grader:
        grades = ask(grader, "child", "right")
    assert "exit status 7" in (grades[0].failure or "")
    assert grades[1].correct


def test_grading_works_in_any_thread_and_with_users_alarms(users):
    got: list[Grade] = []
    with open_grader("graders_of_mine:behave", workers=1, timeout=20) as mine, open_grader("math", timeout=60) as math:

        def work():
            got.extend(ask(mine, "alarm", "right"))
            got.extend(ask(math, r"\boxed{0.5}", answer=r"\frac12"))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [g.reward for g in got].count(1.0) == 6
        assert len(got) == 9
        assert mine.failures == math.failures == Counter()


def test_workers_are_reused_and_end_with_the_grader(users):
    grader = open_grader("graders_of_mine:behave", workers=2, timeout=30)
    first = {g.reward for g in ask(grader, *["pid"] * 8)}
    second = {g.reward for g in ask(grader, *["pid"] * 8)}
    pids = grader._pool.pids()
    assert first | second <= set(map(float, pids))
    assert os.getpid() not in pids
    grader.close()
    assert gone(pids, 10)


def test_math_starts_no_worker_for_what_text_settles():
    with MathGrader() as grader:
        ask(grader, r"\boxed{7}", r"\boxed{8}", "nothing", answer="7")
        assert grader._pool.pids() == []


def test_a_long_text_goes_through_the_pipes_whole(users):
    text = "ü\n\ud800" * 300_000
    with open_grader("graders_of_mine:by_length", workers=2, timeout=60) as grader:
        assert [g.reward for g in ask(grader, *[text] * 6)] == [len(text) / 10] * 6


def test_a_grader_that_reads_no_input_for_long_does_not_block_the_parent(users):
    with open_grader("graders_of_mine:by_length", workers=1, timeout=1.0) as grader:
        stopped = grader._pool.pids()[0]
        os.kill(stopped, signal.SIGSTOP)  # it takes nothing from its pipe, which the text overfills
        grades = ask(grader, "x" * 1_000_000, "x" * 10)
        assert (grades[0].failure or "").startswith("timeout")
        assert grades[1].reward == 1.0


# --- users' functions ---------------------------------------------------------------------------------------------


def test_a_function_gets_the_problem_and_no_torch(users):
    with open_grader("graders_of_mine:fields", workers=1, timeout=30) as grader:
        assert ask(grader, "anything") == [Grade(1.0, True)]
    with open_grader("graders_of_mine.py:Rewards.nested", workers=1, timeout=30) as grader:
        assert ask(grader, "anything") == [Grade(0.25, False)]


def test_correct_is_a_reward_above_one_half(users):
    with open_grader("graders_of_mine:by_length", workers=1, timeout=30) as grader:
        assert [(g.reward, g.correct) for g in ask(grader, "x" * 5, "x" * 6, "x" * 20)] == [
            (0.5, False),
            (0.6, True),
            (2.0, True),
        ]


@pytest.mark.parametrize(
    ("text", "shown"), [("nan", "nan"), ("inf", "-inf"), ("none", "None"), ("text", "'1.0'"), ("big", "1000")]
)
def test_a_reward_that_is_no_finite_number_is_refused_with_function_problem_and_remedy(users, text, shown):
    with open_grader("graders_of_mine:odd", workers=1, timeout=30) as grader:
        assert ask(grader, "true")[0].reward == 1.0
        with pytest.raises(
            ValueError, match=rf"'graders_of_mine:odd' returned {shown}.* for problem a\.jsonl:2.*finite number"
        ):
            ask(grader, "true", text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:grade", r"'no_such_module:grade' cannot be used: ModuleNotFoundError.*importable from"),
        ("graders_of_mine:nothing", r"AttributeError.*'nothing'"),
        ("graders_of_mine:not_a_function", r"is a int, not a function"),
        ("broken_of_mine:grade", r"a_package_that_is_not_there.*\(broken_of_mine\.py:1\)"),
        ("nowhere/file.py:grade", r"there is no file .*nowhere/file\.py"),
        ("mat", r"there is no grader 'mat'; did you mean 'math'\?: write 'exact', 'math', or"),
        ("graders_of_mine:", r"there is no grader 'graders_of_mine:'"),
    ],
)
def test_a_grader_that_cannot_be_used_is_refused_at_the_start_with_the_remedy(users, name, message):
    with pytest.raises(ValueError, match=message):
        open_grader(name)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="workers = 0"):
        open_grader("math", workers=0)
    with pytest.raises(ValueError, match="timeout = 0"):
        open_grader("math", timeout=0)


# --- the end of the parent ----------------------------------------------------------------------------------------

PARENT = """
import sys, threading
from tenbit.tasks.grading import open_grader
from tenbit.types import Problem

grader = open_grader("graders_of_mine:behave", workers=2, timeout=100)
grader.grade([(Problem("q", "right", "a:1"), "right")] * 50)
print(*grader._pool.pids(), flush=True)
try:
    grader.grade([(Problem("q", "right", "a:1"), text) for text in sys.argv[1:]])
except KeyboardInterrupt:
    again = grader.grade([(Problem("q", "right", "a:1"), "right")])
    print("interrupted", again[0].correct, flush=True)
"""


def start_parent(*texts: str) -> tuple[subprocess.Popen[str], list[int]]:
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), *texts], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert pids
    assert all(alive(pid) for pid in pids)
    return parent, pids


@pytest.mark.parametrize("text", ["sleep", "hang"])
def test_workers_end_when_the_parent_is_killed_in_the_middle_of_a_hang(users, text):
    parent, pids = start_parent(text, text)
    time.sleep(0.5)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(pids, 20)


def test_code_that_never_yields_ends_when_nobody_is_left_to_kill_it(users):
    """The worker alone, its parent gone: it cannot even notice, and its processor time runs out."""
    worker = Path(sys.modules[MathGrader.__module__].__file__ or "").with_name("grade_worker.py")
    replies, theirs = os.pipe()
    budget = 1.0  # seconds of processor time in all; the worker allows (timeout + 10) s on each of the cores
    job = {"grader": "graders_of_mine:behave", "path": sys.path, "timeout": budget / (os.cpu_count() or 1) - 10.0}
    item = {"prompt": "q", "answer": "right", "id": "a:1", "text": "hold"}
    lone = subprocess.Popen([sys.executable, "-P", str(worker), str(theirs)], stdin=subprocess.PIPE, pass_fds=(theirs,))
    os.close(theirs)
    assert lone.stdin is not None
    lone.stdin.write("".join(json.dumps(line) + "\n" for line in (job, item)).encode())
    lone.stdin.flush()
    assert lone.wait(timeout=120) == -signal.SIGPROF
    lone.stdin.close()
    os.close(replies)


def test_ctrl_c_reaches_the_parent_and_grading_can_go_on(users):
    parent, pids = start_parent("sleep")
    time.sleep(1.0)
    for process in (parent.pid, *pids):  # as a terminal does, to all of them
        os.kill(process, signal.SIGINT)
    out, _ = parent.communicate(timeout=60)
    assert out.split() == ["interrupted", "True"]
    assert parent.returncode == 0
    assert gone(pids, 20)
