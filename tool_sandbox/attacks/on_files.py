"""Attacks through files: what a call leaves, what it may reach, and what it may fill. attack.py says how to read them."""

from __future__ import annotations

from tool_sandbox.attacks.attack import Attack

FILES = (
    Attack(
        "read the neighbour",
        "its code, environment, memory, files and descriptors, wherever they may be, again and again",
        """
import glob
home = os.getcwd()
end = time.monotonic() + 1.0
seen = set()
while time.monotonic() < end:
    patterns = ("/w/*", "/w/*/*", "/tmp/*", "/dev/shm/*", "/proc/[0-9]*/environ", "/proc/[0-9]*/cmdline")
    patterns += ("/proc/[0-9]*/fd/*", "/proc/[0-9]*/mem", "/proc/[0-9]*/cwd/*", "/proc/[0-9]*/root/w/*/*")
    for pattern in patterns:
        for path in glob.glob(pattern):
            if not path.startswith((home, f"/proc/{os.getpid()}/")):
                try:
                    data = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb").read(10_000)
                    if data not in seen:
                        print(path, data)
                    seen.add(data)
                except OSError:
                    pass
print("end")
""",
    ),
    Attack(
        "write where it must not",
        "any file or folder of the image, the runner, the packages, the other slots",
        """
for folder, folders, files in os.walk("/"):
    if folder.startswith(("/proc", "/sys", "/dev", "/tmp", os.getcwd())):
        folders.clear()
        continue
    for name in files:
        path = os.path.join(folder, name)
        if os.access(path, os.W_OK):
            print("BREACH", path)
    if os.access(folder, os.W_OK):
        print("BREACH", folder)
for folder in ("/", "/etc", "/w", "/dev", "/opt/site-packages", "/opt/runner/tool_sandbox/image"):
    os.stat(folder)
    attempt("write in " + folder, lambda: open(folder + "/x", "w"))
attempt("change the runner", lambda: open("/opt/runner/tool_sandbox/image/runner.py", "a"))
print("end")
""",
        timeout_s=30.0,
    ),
    Attack(
        "links",
        "its directory renamed, opened, replaced by a link; links to others' files, left where the cleaner will walk",
        """
home = os.getcwd()
for what, action in {
    "open it": lambda: os.chmod(home, 0o777),
    "rename it": lambda: os.rename(home, "/tmp/home"),
    "remove it": lambda: os.rmdir(home),
    "give it away": lambda: os.chown(home, 0, 0),
    "link over it": lambda: os.replace("/tmp/link", home),
    "hard link to a system file": lambda: os.link("/etc/passwd", home + "/passwd"),
    "hard link to the runner": lambda: os.link("/opt/runner/tool_sandbox/image/runner.py", "/tmp/runner.py"),
}.items():
    attempt(what, action)
for top in (home, "/tmp", "/dev/shm"):
    os.chdir(top)
    for number in range(17):
        os.symlink(f"/w/{number}", f"slot{number}")
    os.symlink("/etc", "etc"), os.symlink("loop", "loop"), os.symlink("/proc/1/root", "root"), os.mkfifo("fifo")
    os.mkdir("d"), os.symlink("/opt", "d/opt"), os.symlink("..", "d/up")
    for name in ("-rf", "--", "a\\nb", "\\udcff", " ", "*", "x" * 255):
        open(name, "w").close()
    os.link("-rf", "hard")
print("end")
""",
    ),
    Attack(
        "closed and bottomless folders",
        "folders that are closed to everyone, and deeper than a path can name",
        """
for top in ("/tmp", "/dev/shm", os.getcwd()):
    os.makedirs(f"{top}/closed/inner")
    open(f"{top}/closed/inner/secret", "w").write("secret")
    os.chmod(f"{top}/closed/inner", 0)
    os.chmod(f"{top}/closed", 0)
    os.makedirs(f"{top}/deep")
    os.chdir(f"{top}/deep")
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    os.chdir("/")
print("end")
""",
    ),
    Attack(
        "fill the disk",
        "files until nothing is left, in its directory, /tmp and /dev/shm",
        """
for top in ("/tmp", "/dev/shm", os.getcwd()):
    total = 0
    try:
        for number in range(64):
            with open(f"{top}/big{number}", "wb") as file:
                while True:
                    total += file.write(bytes(1 << 20))
                    if total > 1 << 30:
                        print("BREACH", top); os._exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG):
            raise
print("end")
""",
        timeout_s=20.0,
    ),
    Attack(
        "fill the inodes",
        "empty files until there can be no more, in its directory, /tmp and /dev/shm",
        """
for top in ("/tmp", "/dev/shm", os.getcwd()):
    try:
        for number in range(100_000):
            os.close(os.open(f"{top}/{number}", os.O_CREAT))
        print("BREACH", top)
    except OSError:
        pass
print("end")
""",
        timeout_s=20.0,
    ),
    Attack(
        "poison what is imported",
        "modules, .pth files and hooks where the next call's Python might find them; the libraries themselves, changed",
        """
import builtins, math, site, sympy
poison = "print('BREACH poisoned'); raise SystemExit"
version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
places = [os.getcwd(), "/tmp", "/dev/shm", f"{os.environ['HOME']}/.local/lib/{version}/site-packages"]
places += [site.getusersitepackages()] + [place for place in sys.path if place]
for place in places:
    for name in ("sitecustomize.py", "usercustomize.py", "json.py", "numpy.py", "math.py", "sympy/__init__.py", "x.pth"):
        try:
            os.makedirs(os.path.dirname(f"{place}/{name}"), exist_ok=True)
            open(f"{place}/{name}", "w").write(poison)
        except OSError:
            pass
sys.path[:] = ["/tmp", "/dev/shm", *sys.path]
sys.meta_path.insert(0, None)
sys.modules["json"] = None
math.pi, sympy.sqrt, builtins.print2, os._exit = 3, None, print, lambda code: None
os.environ.update(PYTHONPATH="/tmp", LD_PRELOAD="/tmp/x.so", PYTHONSTARTUP="/tmp/json.py")
print("end")
""",
    ),
    Attack(
        "environment",
        "secrets that the engine or the gateway may have left in the environment or on the command line",
        """
known = {"HOME", "LANG", "LC_CTYPE", "LOGNAME", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX", "PATH", "PWD",
         "PYTHONDONTWRITEBYTECODE", "PYTHONINTMAXSTRDIGITS", "PYTHONPATH", "TMPDIR", "USER", "LOKY_MAX_CPU_COUNT",
         "MPLBACKEND", "TQDM_MININTERVAL"}
if set(os.environ) - known:
    print("BREACH", sorted(set(os.environ) - known))
if "token" in open("/proc/1/cmdline").read().lower():
    print("BREACH", open("/proc/1/cmdline").read())
print("end")
""",
    ),
)
