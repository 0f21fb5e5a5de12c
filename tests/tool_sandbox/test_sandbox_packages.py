"""The packages that code tools elsewhere have: each does its work inside a call's limits, and says what it can't do here."""

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tool_sandbox import build
from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.local import LocalGateway


@pytest.fixture
def image_pip() -> ModuleType:
    """The pip of the image, under a name of its own."""
    spec = importlib.util.spec_from_file_location("image_pip", build.SOURCES / "extras" / "pip.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_image_says_it_has_is_what_is_asked_for(image_pip: ModuleType) -> None:
    asked, needed = (build.SOURCES / "requirements.txt").read_text().split("# Needed by those above.\n")
    assert sorted(re.findall(r"^[\w.-]+(?===)", asked, re.MULTILINE)) == sorted(image_pip.PACKAGES.values())
    assert not set(re.findall(r"^[\w.-]+(?===)", needed, re.MULTILINE)) & set(image_pip.PACKAGES.values())


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["-q", "numpy", "pandas==1.2", "sympy>=1.0"], ["numpy", "pandas", "sympy"]),
        (["scikit-learn[all]~=1.0", "--index-url", "somewhere", "-U", "x"], ["scikit-learn", "x"]),
        (["-r", "needed.txt"], []),
    ],
)
def test_names_that_are_asked_for(image_pip: ModuleType, arguments: list[str], names: list[str]) -> None:
    assert image_pip.wanted(arguments) == names


@pytest.mark.docker
@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("import gmpy2\nprint(gmpy2.is_prime(2**61 - 1), gmpy2.mpz(3) ** 5)", "True 243\n"),
        ("import tqdm, tabulate, bs4\nprint(bs4.BeautifulSoup('<p>a<b>c</b></p>', 'html.parser').b.text)", "c\n"),
        (
            "import pandas as pd\nframe = pd.DataFrame({'a': [1, 2], 'b': ['x', 'y']})\n"
            "frame.to_excel('t.xlsx', index=False)\nprint(pd.read_excel('t.xlsx').equals(frame))\n"
            "print(frame.to_markdown(index=False))",
            "True\n|   a | b   |\n|----:|:----|\n|   1 | x   |\n|   2 | y   |\n",
        ),
        (
            "import networkx as nx\ng = nx.path_graph(5)\nprint(nx.shortest_path(g, 0, 4), nx.pagerank(g)[0] > 0)",
            "[0, 1, 2, 3, 4] True\n",
        ),
        ("from shapely.geometry import box\nprint(box(0, 0, 2, 2).intersection(box(1, 1, 3, 3)).area)", "1.0\n"),
        (
            "import numpy as np, statsmodels.api as sm\nx = np.arange(20.0)\n"
            "print(sm.OLS(2 * x + 1, sm.add_constant(x)).fit().params.round(6).tolist())",
            "[1.0, 2.0]\n",
        ),
        (
            "import pandas as pd, statsmodels.formula.api as smf\n"
            "frame = pd.DataFrame({'x': range(9), 'y': range(0, 27, 3)})\n"
            "print(round(smf.ols('y ~ x', frame).fit().params['x'], 6))",
            "3.0\n",
        ),
        (
            "from sklearn.cluster import KMeans\nfrom sklearn.ensemble import RandomForestClassifier\n"
            "from sklearn.datasets import load_iris\nx, y = load_iris(return_X_y=True)\n"
            "print(RandomForestClassifier(5, n_jobs=-1, random_state=0).fit(x, y).score(x, y) > 0.9)\n"
            "print(len(set(KMeans(3, n_init=1).fit(x).labels_)))",
            "True\n3\n",
        ),
        ("def test_it(): assert 1 + 1 == 2\nimport pytest\nprint(int(pytest.main(['-q', __file__])))", None),
        ("import seaborn, matplotlib\nprint(matplotlib.get_backend())", "module://sandbox_figures\n"),
        ("import joblib\nprint(joblib.Parallel(2)(joblib.delayed(abs)(-n) for n in range(3)))", "[0, 1, 2]\n"),
        ("import joblib\nprint(joblib.Parallel(-1)(joblib.delayed(abs)(-n) for n in range(3)))", "[0, 1, 2]\n"),
    ],
)
def test_a_package_works(client: SandboxClient, code: str, output: str | None) -> None:
    result = client.call("python", code, timeout_s=50)
    assert result.status == "ok", result
    assert result.output == output if output is not None else result.output.endswith("0\n")


@pytest.mark.docker
def test_numba_compiles_within_the_default_memory() -> None:
    code = (
        "import numba\n@numba.njit\ndef f(n):\n    s = 0\n    for i in range(n):\n        s += i % 7\n    return s\n"
        "print(f(10**7))"
    )
    config = SandboxConfig(num_containers=1, num_spares=0, start_timeout_s=120, token="t")
    with LocalGateway(config) as gateway, SandboxClient(gateway.address, token="t") as client:
        result = client.call("python", code, timeout_s=50)
    assert (result.status, result.output) == ("ok", "29999994\n"), result


@pytest.mark.docker
@pytest.mark.parametrize(
    "code",
    [
        "import tkinter as tk\nfrom tkinter import messagebox, ttk\nprint(tk.END)\ntk.Tk()",
        "from tkinter import *\nclass App(Frame):\n    pass\nprint(END)\nApp()",
        "import turtle\nprint('end')\nturtle.forward(10)",
    ],
)
def test_a_window_is_refused_as_on_any_machine_without_a_display(client: SandboxClient, code: str) -> None:
    result = client.call("python", code, timeout_s=20)
    assert (result.status, result.output.splitlines()[0]) == ("error", "end"), result
    assert result.output.splitlines()[-1].startswith("tkinter.TclError: no display name and no $DISPLAY"), result


@pytest.mark.docker
def test_figures_are_saved_and_their_names_told(client: SandboxClient) -> None:
    code = (
        "import matplotlib.pyplot as plt\n"
        "for n in range(2):\n    plt.plot([1, 2, n]); plt.title('T'); plt.show()\n"
        "plt.show()\n"
        "print(*(plt.imread(f'figure_{n}.png').shape for n in (1, 2)), plt.get_fignums())"
    )
    result = client.call("python", code, timeout_s=50)
    assert result.output == (
        "Nothing can be shown in this sandbox; saved instead: figure_1.png\n"
        "Nothing can be shown in this sandbox; saved instead: figure_2.png\n"
        "(480, 640, 4) (480, 640, 4) []\n"
    ), result


@pytest.mark.docker
@pytest.mark.parametrize("module", ["tqdm", "tqdm.auto", "tqdm.notebook"])
def test_a_progress_bar_is_two_lines(client: SandboxClient, module: str) -> None:
    """Of a bar that would be drawn every tenth of a second, the first and the last state."""
    code = f"import time\nfrom {module} import tqdm\nfor _ in tqdm(range(40)): time.sleep(0.02)"
    result = client.call("python", code, timeout_s=20)
    assert (result.status, result.output.count("/40")) == ("ok", 2), result


@pytest.mark.docker
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import requests\nrequests.get('https://example.com/x')", "requests.exceptions.ConnectionError"),
        ("import urllib.request\nurllib.request.urlopen('https://example.com')", "urllib.error.URLError"),
        ("import socket\nsocket.create_connection(('example.com', 80))", "socket.gaierror"),
        ("import socket\nsocket.create_connection(('192.0.2.1', 80))", "OSError"),
        ("import http.client\nhttp.client.HTTPConnection('example.com').request('GET', '/')", "socket.gaierror"),
        ("import pandas\npandas.read_csv('https://example.com/x.csv')", "urllib.error.URLError"),
        ("import http.server\nhttp.server.HTTPServer(('127.0.0.1', 0), None)", "OSError"),
    ],
)
def test_no_network_is_one_sentence(client: SandboxClient, code: str, error: str) -> None:
    result = client.call("python", code, timeout_s=50)
    assert result.status == "error"
    assert result.output.splitlines()[-1] == f"{error}: there is no network in this sandbox, not even to 127.0.0.1"
    assert "/opt" not in result.output
    assert len(result.output.splitlines()) <= 5  # a head, the line, its text, its marks, the sentence


@pytest.mark.docker
def test_a_network_error_that_code_prints_says_it(client: SandboxClient) -> None:
    code = "import requests\ntry: requests.get('https://example.com')\nexcept Exception as error: print(error)"
    assert "there is no network in this sandbox" in client.call("python", code, timeout_s=20).output


@pytest.mark.docker
@pytest.mark.parametrize(
    "code",
    [
        "!pip install torch 'numpy>=1'\nprint('on')",
        "import subprocess\nsubprocess.run(['pip', 'install', 'torch'])\nprint('on')",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'pip', 'install', '-q', 'torch'])\nprint('on')",
    ],
)
def test_an_installation_that_cannot_be_is_one_sentence_with_what_is_there(client: SandboxClient, code: str) -> None:
    result = client.call("python", code, timeout_s=20)
    first, second = result.output.splitlines()
    assert first.startswith("pip: this sandbox has no torch, and no network to install it from; beside the standard")
    assert "sklearn, statsmodels, sympy" in first
    assert second == "on"


@pytest.mark.docker
@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("from google.colab import drive", "(this sandbox has no google, and no network to install it from; beside "),
        ("import torch", "(this sandbox has no torch, and no network to install it from; beside "),
        ("input('n: ')", "(nobody answers input() in this sandbox: put the values into the code)"),
    ],
)
def test_what_is_missing_is_told_in_a_last_line(client: SandboxClient, code: str, sentence: str) -> None:
    result = client.call("python", code, timeout_s=20)
    assert result.status == "error"
    assert result.output.splitlines()[-1].startswith(sentence)


def test_an_image_of_other_sources_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources in folders count, too; what Python compiled of them doesn't."""
    monkeypatch.setattr(build, "SOURCES", shutil.copytree(build.SOURCES, tmp_path / "image"))
    before = build.image_tag()
    (tmp_path / "image" / "extras" / "IPython" / "display.pyc").write_bytes(b"")
    assert build.image_tag() == before
    (tmp_path / "image" / "extras" / "IPython" / "display.py").write_text("")
    assert build.image_tag() != before
