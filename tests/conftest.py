"""What every test stands on: eight fake CPU devices, strict dtypes, no network, nothing in $HOME.

Child processes inherit the environment. Compiled programs are kept in the user's cache folder.
`NANOCHAT_TEST_GPU=1` (scripts/test.sh --gpu) leaves the real devices visible.
"""

import atexit
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

ON_GPU = os.environ.get("NANOCHAT_TEST_GPU") == "1"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanochat_jax_tests"
BASE_DIR = tempfile.mkdtemp(prefix="nanochat_jax_tests_")
atexit.register(shutil.rmtree, BASE_DIR, ignore_errors=True)

os.environ |= {
    "NANOCHAT_BASE_DIR": BASE_DIR,
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
if not ON_GPU:  # eight devices; programs this small cost more to optimise than to run
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}

import hypothesis  # noqa: E402  # after the environment, because it may import JAX
import pytest  # noqa: E402

# Time limits fail at random on a busy machine; the same examples every time can be run again.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


def pytest_collection_modifyitems(items):
    if not ON_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords also hold the names of folders
                item.add_marker(pytest.mark.skip(reason="needs a GPU: scripts/test.sh --gpu"))


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Sockets reach this machine only; a look-up of any other host is an error too."""

    def check(host) -> None:
        name = host.decode() if isinstance(host, bytes) else host
        if name and not re.fullmatch(r"localhost|127\.[\d.]+|::1", name):
            raise RuntimeError(f"a test tried to reach {name}; tests use loopback addresses only")

    def guarded(call):
        def connect(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return call(self, address)

        return connect

    look_up = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        check(host)
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Numbers computed with upstream: logits, gradients, optimizer steps, chat tokens."""
    return Path(__file__).parent / "goldens"


TEXT = (
    "The river ran past the old mill, and the miller's daughter counted the boats that went by.",
    "There were seven boats in the morning and twelve in the afternoon; nineteen boats in all.",
    'When she told her father, he laughed: "Nobody counts boats," he said, "unless bored."',
    "She was not bored. She wanted to know how many people the river carried in a single day.",
    "def count(boats):\n    total = 0\n    for boat in boats:\n        total += boat.people\n",
    "In winter the river froze, and then it carried nobody, except for the children who skated.",
    "Am Fluss stand eine alte Mühle; où sont les bateaux? 船は七つあります。 It's 3.14 miles.",
)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A tokenizer of 384 ids: 256 bytes, some merges of the text above, the special tokens."""
    from nanochat_jax.tokenizer import bpe

    return bpe.train(iter(TEXT * 4), vocab_size=384)


@pytest.fixture(scope="session")
def random_params():
    """GPTConfig -> parameters of the right shapes by path, nowhere zero, so that every path through
    a model counts; drawn without compiling anything."""
    import numpy as np

    from nanochat_jax.model.gpt import param_shapes

    def draw(config) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        params = {}
        for path, leaf in param_shapes(config).items():
            value = rng.standard_normal(leaf.shape, np.float32)
            if path.endswith("kernel"):
                value *= leaf.shape[0] ** -0.5
            elif path.endswith("lambdas"):
                value = 1 + 0.1 * value
            elif path.endswith("lambda"):
                value = 0.3 + 0.1 * value
            params[path] = value.astype(np.float32)
        return params

    return draw
