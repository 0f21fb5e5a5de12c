"""What a well-meant call gets back: each status, and output as `python main.py` would print it."""

import time

import pytest

from tool_sandbox.client import SandboxClient

pytestmark = pytest.mark.docker


def test_ok(client: SandboxClient) -> None:
    result = client.call("python", "print(2 + 2)")
    assert (result.status, result.output) == ("ok", "4\n")
    assert result.fresh
    assert 0 < result.duration_s < 5


def test_the_last_expression_is_shown(client: SandboxClient) -> None:
    assert client.call("python", "2 + 2").output == "4\n"


def test_streams_have_their_names(client: SandboxClient) -> None:
    assert client.call("python", "open('/dev/stdout', 'w').write('x')").output == "x"


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("# first\nprint(open(__file__).read().splitlines()[0])", "# first\n"),
        (
            "from pathlib import Path\nimport os\nprint(Path(__file__).parent == Path.cwd(), os.path.isfile(__file__))",
            "True True\n",
        ),
        (
            "import inspect\ndef f(): return 7\nclass C: pass\nprint(inspect.getsource(f) + inspect.getsource(C), end='')",
            None,
        ),
        (
            "import subprocess, sys\nif len(sys.argv) > 1: print('again')\n"
            "else: print(subprocess.run([sys.executable, __file__, 'x'], capture_output=True, text=True).stdout, end='')",
            "again\n",
        ),
        (
            "```python\nimport runpy\nif __name__ == '__main__': runpy.run_path(__file__, {}, 'x')\nprint(__name__)\n```",
            "x\n__main__\n",
        ),
        (
            "import multiprocessing as mp\ndef f(x): return x + 1\n"
            "if __name__ == '__main__':\n    with mp.get_context('spawn').Pool(2) as p: print(p.map(f, [1, 2]))",
            "[2, 3]\n",
        ),
    ],
)
def test_the_code_is_a_file(client: SandboxClient, code: str, output: str | None) -> None:
    result = client.call("python", code, timeout_s=20)
    assert result.output == (output if output is not None else "def f(): return 7\nclass C: pass\n"), result


def test_nothing_of_an_earlier_call_is_in_the_directory(client: SandboxClient) -> None:
    for n in range(6):
        code = (
            f"import os\nprint(os.listdir(), {n}); os.remove(__file__); os.mkdir(__file__); os.mkdir(__file__ + '/x')"
        )
        assert client.call("python", code, timeout_s=20).output == f"['main.py'] {n}\n"


def test_long_numbers_are_shown(client: SandboxClient) -> None:
    assert client.call("python", "print(len(str(7 ** 9000)))").output == "7606\n"
    command = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(len(str(7 ** 9000)))'])"
    assert client.call("python", command, timeout_s=20).output == "7606\n"


@pytest.mark.parametrize(
    ("code", "status", "output"),
    [
        ("display([1, 'a']); display({}, 2)", "ok", "[1, 'a']\n{}\n2\n"),
        ("from IPython.display import Math, display\ndisplay(Math('x^2'))", "ok", "x^2\n"),
        ("print(1)\nexit()\nprint(2)", "ok", "1\n"),
        ("print(1)\nquit(3)", "error", "1\n"),
        ("async def f(): return 5\nawait f()", "ok", "5\n"),
        ("print(f“{1 + 1}”)", "ok", "2\n"),
        ("%timeit sum(range(4))", "ok", "6\n"),
    ],
)
def test_what_notebooks_take_is_taken(client: SandboxClient, code: str, status: str, output: str) -> None:
    result = client.call("python", code, timeout_s=20)
    assert (result.status, result.output) == (status, output)


def test_twenty_threads(client: SandboxClient) -> None:
    code = "import threading as t\ne = t.Event()\nfor _ in range(20): t.Thread(target=e.wait).start()\ne.set(); print('all')"
    assert client.call("python", code, timeout_s=20).output == "all\n"


def test_warm_libraries(client: SandboxClient) -> None:
    code = (
        "import sympy, numpy, scipy.optimize\n"
        "x = sympy.Symbol('x')\n"
        "print(sympy.solve(x**2 - 5*x + 6, x), numpy.arange(3).sum(), scipy.optimize.brentq(lambda v: v - 2, 0, 5))"
    )
    assert client.call("python", code, timeout_s=20).output == "[2, 3] 3 2.0\n"


def test_error_shows_the_users_frames_only(client: SandboxClient) -> None:
    result = client.call("python", "def f(n):\n    return 1 / n\nprint('before')\nf(0)")
    assert result.status == "error"
    assert result.output == (
        "before\n"
        "Traceback (most recent call last):\n"
        '  File "main.py", line 4, in <module>\n'
        "    f(0)\n"
        '  File "main.py", line 2, in f\n'
        "    return 1 / n\n"
        "           ~~^~~\n"
        "ZeroDivisionError: division by zero\n"
    )


def test_syntax_error(client: SandboxClient) -> None:
    result = client.call("python", "print('a'")
    assert result.status == "error"
    assert "SyntaxError" in result.output
    assert "/opt" not in result.output


@pytest.mark.parametrize(
    ("code", "status", "output"),
    [
        ("import sys; print('a'); sys.exit(0)", "ok", "a\n"),
        ("import sys; sys.exit(3)", "error", ""),
        ("import sys; sys.exit('bye')", "error", "bye\n"),
        ("if __name__ == '__main__': print('main')", "ok", "main\n"),
        ("import threading; threading.Thread(target=lambda: print('thread')).start()", "ok", "thread\n"),
        ("import atexit; atexit.register(print, 'last'); print('first')", "ok", "first\nlast\n"),
        ("import subprocess; print(subprocess.run(['echo', 'x'], capture_output=True).stdout)", "ok", "b'x\\n'\n"),
        ("open('f', 'w').write('kept'); print(open('f').read())", "ok", "kept\n"),
        ("print('é∑😀')", "ok", "é∑😀\n"),
        ("import os; os.write(1, b'\\xff')", "ok", "�"),
    ],
)
def test_it_behaves_as_python_does(client: SandboxClient, code: str, status: str, output: str) -> None:
    result = client.call("python", code)
    assert (result.status, result.output) == (status, output)


def test_input_is_empty(client: SandboxClient) -> None:
    assert "EOFError" in client.call("python", "input()").output


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_timeout_is_kept_and_keeps_what_was_printed(client: SandboxClient, code: str) -> None:
    start = time.monotonic()
    result = client.call("python", "print('so far')\n" + code, timeout_s=0.5)
    assert (result.status, result.output) == ("timeout", f"so far\nIt was at line 2: {code}\n")
    assert "0.5 s" in result.message
    assert 0.4 <= result.duration_s < 10.0  # interrupted a fifth before its limit
    assert time.monotonic() - start < 10.0


def test_code_cannot_catch_its_deadline(client: SandboxClient) -> None:
    code = (
        "import signal\n"
        "for n in range(1, 32):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except OSError: pass\n"
        "while True:\n"
        "    try:\n"
        "        while True: pass\n"
        "    except BaseException: pass"
    )
    assert client.call("python", code, timeout_s=0.5).status == "timeout"


def test_siblings_draw_different_random_numbers(client: SandboxClient) -> None:
    for code in ("import random; print(random.random())", "import numpy; print(numpy.random.rand())"):
        assert len({client.call("python", code).output for _ in range(4)}) == 4


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print('no line end', end='')\nwhile True: pass", "no line endIt was at line 2: while True: pass\n"),
        ("import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what it has')", "what it has\n"),
        (
            "import subprocess\nprint('a', end='')\nsubprocess.run(['sleep', '60'])",
            "aIt was at line 3: subprocess.run(['sleep', '60'])\n",
        ),
    ],
)
def test_a_call_is_interrupted_before_it_is_killed(client: SandboxClient, code: str, output: str) -> None:
    result = client.call("python", code, timeout_s=2.0)
    assert (result.status, result.output) == ("timeout", output)


def test_workers_that_python_starts_work(client: SandboxClient) -> None:
    """None of what they need is behind the system call filter."""
    code = (
        "import asyncio, multiprocessing, concurrent.futures as f\n"
        "with multiprocessing.Pool(2) as pool: print(pool.map(abs, [-1, -2]))\n"
        "with f.ThreadPoolExecutor(2) as pool: print(list(pool.map(abs, [-3])))\n"
        "print(asyncio.run(asyncio.sleep(0, 4)))"
    )
    result = client.call("python", code, timeout_s=20)
    assert result.output == "[1, 2]\n[3]\n4\n", result


def test_pandas(client: SandboxClient) -> None:
    code = "import pandas as pd; print(pd.DataFrame({'a': [1, 2], 'b': ['x', 'x']}).groupby('b').a.sum().to_dict())"
    assert client.call("python", code, timeout_s=20).output == "{'x': 3}\n"
