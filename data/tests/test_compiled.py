"""How fast.c becomes a library (data/lib/compiled.py): compilers, processors, the cache
that keeps it between processes, and what memory the C touches."""

import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from data.lib import compiled, fast, fast_linear
from data.tests.helpers import ROOT, Beside, micro_ids
from data.tests.test_fast import (
    check_product,
    check_stream,
    fast_layer,
    loaded_gpt,
    randn,
    random_codes,
)

SOURCE = ROOT / "data" / "lib" / "fast.c"


@pytest.fixture
def has_compiler():
    """Skips a test where C does not compile."""
    if fast_linear.c_library() is None:
        pytest.skip("there is no C compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder, made empty. A small C file is beside it."""
    if sys.platform in ("win32", "darwin"):
        pytest.skip("the folder has another name")
    (tmp_path / "small.c").write_text("int one(void) { return 1; }\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tsld"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A function that makes CC a shell script of one line. What it returns gives a list
    of the commands that have compiled since."""
    if os.name == "nt":
        pytest.skip("there are no shell scripts")
    log = tmp_path / "log"
    log.touch()

    def use(line='exec cc "$@"'):
        note = f'case "$*" in *-dM*) ;; *) echo "$*" >> {log} ;; esac'
        script = write_script(tmp_path, f"{note}\n{line}")
        monkeypatch.setenv("CC", str(script))
        return lambda: log.read_text().splitlines()

    return use


def write_script(folder, lines):
    """A compiler in a folder that is this shell script."""
    script = folder / "cc"
    script.write_text(f"#!/bin/sh\n{lines}\n")
    script.chmod(0o755)
    return script


# --------------------------------------------------------------------------------------
# Compilers


# A compiler is a line of a shell script. The last -march counts.
COMPILERS = {
    "without OpenMP": 'case " $* " in *" -fopenmp "*) exit 1;; *) exec cc "$@";; esac'
}
if shutil.which("clang"):
    COMPILERS["clang"] = 'exec clang "$@"'
if platform.machine() == "x86_64":
    COMPILERS["narrow registers"] = 'exec cc "$@" -march=x86-64'
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        COMPILERS["AVX2"] = 'exec cc "$@" -march=x86-64-v3'


@Beside
def libraries(folder):
    """A folder for each compiler, and the cache in which it has left its library."""
    code = "import pathlib, sys; from data.lib import compiled;"
    code += "compiled.load(pathlib.Path(sys.argv[1]))"
    if os.name != "nt" and shutil.which("cc"):
        for name, line in COMPILERS.items():
            (folder / name).mkdir()
            script = write_script(folder / name, line)
            environment = os.environ | {"CC": shlex.quote(str(script))}
            environment |= {"XDG_CACHE_HOME": str(folder / name)}
            command = [sys.executable, "-c", code, str(SOURCE)]
            subprocess.run(command, cwd=ROOT, env=environment, timeout=60)
    return folder


@pytest.mark.parametrize("name", COMPILERS)
def test_every_compiler_makes_a_library_that_is_right(
    name, has_compiler, compiler, tmp_path, monkeypatch
):
    folder = libraries() / name
    monkeypatch.setenv("CC", shlex.quote(str(folder / "cc")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    library = fast_linear.c_library.__wrapped__()  # as a new process loads it
    assert library is not None

    with monkeypatch.context() as patch:
        patch.setattr(fast_linear, "c_library", lambda: library)
        check_stream(loaded_gpt(tmp_path)[0], patch)
        patch.setattr(fast_linear, "unpack_ternary", None)
        for out, width in ((192, 2064), (64, 16)):
            check_product(randn(1, width), random_codes(out, width))


@pytest.mark.parametrize("CC", ["", " ", "cc -DSOMETHING=1", "'cc' -DSOMETHING"])
def test_cc_may_be_empty_or_have_flags_of_its_own(CC, has_compiler, cache, monkeypatch):
    monkeypatch.setenv("CC", CC)
    assert load_small(cache) is not None


def test_a_compiler_that_works_says_nothing(has_compiler, cache, capfd):
    for _ in range(2):
        assert load_small(cache) is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("problem", ["no compiler", "it fails", "a quote", "no folder"])
def test_without_a_compiler_the_model_stays_and_one_line_says_so(
    problem, cache, tmp_path, monkeypatch, capsys
):
    if problem == "no folder":  # for the compiled file
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    else:
        none = str(tmp_path / "cc")
        CC = {"no compiler": none, "it fails": "false", "a quote": "cc '"}[problem]
        monkeypatch.setenv("CC", CC)
    load_once = functools.cache(fast_linear.c_library.__wrapped__)
    monkeypatch.setattr(fast_linear, "c_library", load_once)

    model, _ = loaded_gpt(tmp_path)
    modules = list(model.modules())
    expected = model(micro_ids())
    for _ in range(2):
        assert list(fast.speed_up(model).modules()) == modules

    assert torch.equal(model(micro_ids()), expected)

    printed = capsys.readouterr().err
    assert printed.count("tsld: no C (") == printed.count("\n") == 1


def test_what_comes_to_a_machine_without_a_compiler_works(
    has_compiler, tmp_path, monkeypatch
):
    layer = fast_layer(random_codes(64, 96))
    model = fast.speed_up(loaded_gpt(tmp_path)[0])
    text = model.generate(micro_ids(1, 2), 6, temperature=0)
    monkeypatch.setattr(fast_linear, "c_library", lambda: None)

    x = randn(1, 96)
    torch.testing.assert_close(layer(x), x @ random_codes(64, 96).float().t())
    assert torch.equal(model.generate(micro_ids(1, 2), 6, temperature=0), text)


# --------------------------------------------------------------------------------------
# The cache, of a C file that compiles faster than fast.c


def load_small(cache):
    """A library as a new process loads it."""
    source = cache.parent.parent / "small.c"
    return compiled.load(source)


def test_the_library_is_compiled_once_and_kept_for_the_user_alone(
    has_compiler, compiler, cache
):
    compilations = compiler()
    for _ in range(3):
        assert load_small(cache) is not None

    assert len(compilations()) == 1

    (kept,) = cache.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert cache.stat().st_mode & 0o777 == 0o700


def test_another_source_or_flag_or_processor_is_another_library(
    has_compiler, compiler, cache, tmp_path, monkeypatch
):
    compilations = compiler()
    source = tmp_path / "small.c"
    compiled.load(source)
    source.write_bytes(source.read_bytes() + b"\n")
    compiled.load(source)

    monkeypatch.setenv("CC", f"{os.environ['CC']} -DSOMETHING")
    compiled.load(source)
    monkeypatch.setenv("CC", os.environ["CC"].split()[0])
    compiler('exec cc "$@" -mno-avx' if platform.machine() == "x86_64" else "exit 1")
    if platform.machine() == "x86_64":
        compiled.load(source)

    assert len(compilations()) == len([*cache.iterdir()]) >= 3


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_a_folder_that_others_may_write_to_is_left_alone(
    mode, has_compiler, compiler, cache
):
    compilations = compiler()
    load_small(cache)
    (kept,) = cache.iterdir()
    cache.chmod(mode)
    load_small(cache)
    assert len(compilations()) == 2

    kept.unlink()
    load_small(cache)
    assert [*cache.iterdir()] == []


def test_a_file_that_others_may_write_to_is_replaced(has_compiler, compiler, cache):
    compilations = compiler()
    load_small(cache)
    (kept,) = cache.iterdir()
    kept.chmod(0o666)
    load_small(cache)

    assert len(compilations()) == 2
    assert [*cache.iterdir()] == [kept]
    assert kept.stat().st_mode & 0o777 == 0o600


def test_what_belongs_to_another_user_is_not_used(
    has_compiler, compiler, cache, monkeypatch
):
    compilations = compiler()
    load_small(cache)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    load_small(cache)

    assert len(compilations()) == 2


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_file_that_is_no_library_is_replaced(
    content, has_compiler, compiler, cache, capfd
):
    compilations = compiler()
    load_small(cache)
    (kept,) = cache.iterdir()
    kept.unlink()  # it is in use here
    kept.write_bytes(content)
    kept.chmod(0o600)
    for _ in range(2):
        assert load_small(cache) is not None

    assert len(compilations()) == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("place", ["a file", "relative"])
def test_a_cache_that_cannot_be_written_is_done_without_in_silence(
    place, has_compiler, compiler, cache, tmp_path, monkeypatch, capfd
):
    compilations = compiler()
    monkeypatch.chdir(tmp_path)
    if place == "a file":
        cache.parent.write_bytes(b"")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "here")
    before = sorted(tmp_path.iterdir())
    for _ in range(2):
        assert load_small(cache) is not None

    assert len(compilations()) == 2
    assert sorted(tmp_path.iterdir()) == before
    assert capfd.readouterr() == ("", "")


def test_a_copy_that_breaks_off_leaves_nothing(
    has_compiler, compiler, cache, monkeypatch
):
    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    compiler()
    monkeypatch.setattr(shutil, "copyfile", full)

    assert load_small(cache) is not None
    assert [*cache.iterdir()] == []


# --------------------------------------------------------------------------------------
# Processes and memory

FORK = """
import os, torch, tsld
from torch import nn
from data.lib import fast

torch.set_num_threads(2)
packed = tsld.pack_ternary(torch.ones(64, 4096, dtype=torch.int8))
layer = tsld.PackedLinear(4096, packed, torch.ones(1, 1))
model = fast.speed_up(nn.Sequential(layer))
assert model[0] is not layer  # without a compiler
x = torch.ones(1, 4096)
model(x)
if os.fork() == 0:
    os._exit(0 if (model(x) == 4096).all() else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@Beside
def forked(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_STACKSIZE": "64K"}
    return subprocess.check_output(
        [sys.executable, "-c", FORK], cwd=ROOT, env=environment, timeout=60
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_multiplies_too_and_threads_need_little_stack(has_compiler):
    assert forked().strip() == b"0"


# Every array has just the size that fast.c asks for.
SWEEP = """
#include <stdio.h>
#include <stdlib.h>
#include "fast.c"

static float *random_floats(long count)
{
    float *numbers = aligned_alloc(64, (4 * count + 63) / 64 * 64);
    for (long i = 0; i < count; i++)
        numbers[i] = rand() % 2001 / 1000.0f - 1;
    return numbers;
}

static linear random_linear(long out, long in)
{
    unsigned char *codes = malloc(out * in / 4 + 4);
    for (long i = 0; i < out * in / 4 + 4; i++) {
        int some = rand() % 256;
        codes[i] = some & (some << 1 | 0x55); /* no 10 among its codes */
    }
    int has_bias = rand() % 2;
    int step = rand() % 2;
    float *scale = random_floats(step ? out : 1);
    return (linear){codes, scale, has_bias ? random_floats(out) : 0, step};
}

static void free_linear(linear layer)
{
    free((void *)layer.codes), free((void *)layer.scale), free((void *)layer.bias);
}

static int check_layer(long out, long in, long threads)
{
    linear layer = random_linear(out, in);
    float *x = random_floats(in);
    float *y = random_floats(out);
    float *room = random_floats(8 * in * threads);
    ternary_layer(&layer, x, y, (table *)room, out, in, threads);

    int wrong = 0;
    for (long o = 0; o < out; o++) {
        double sum = 0;
        for (long i = 0; i < in; i++) {
            long word = (o / 64 * (in / 16) + i / 16) * 64 + o % 64;
            int code = layer.codes[4 * word + i % 16 / 4] >> 2 * (i % 4) & 3;
            sum += code == 1 ? x[i] : code == 3 ? -x[i] : 0;
        }
        sum *= layer.scale[o * layer.step];
        sum += layer.bias ? layer.bias[o] : 0;
        wrong += fabs(sum - y[o]) > 1e-5 * (1 + in);
    }
    free_linear(layer), free(x), free(y), free(room);
    return wrong;
}

static int check_step(long n_layer, long H, long C, long V, long S, long threads)
{
    gpt *model = malloc(sizeof(gpt) + n_layer * sizeof(block));
    short *halves = malloc(2 * (V + S) * C);
    for (long i = 0; i < (V + S) * C; i++)
        halves[i] = rand() % 0x7c00 - (rand() % 2) * 0x8000;
    model->wte = halves;
    model->wpe = halves + V * C;
    model->lm_head = halves;
    model->ln_f = (norm){random_floats(C), random_floats(C)};
    for (long l = 0; l < n_layer; l++)
        model->h[l] = (block){
            {random_floats(C), random_floats(C)},
            random_linear(3 * C, C), random_linear(C, C),
            {random_floats(C), random_floats(C)},
            random_linear(4 * C, C), random_linear(C, 4 * C)};

    float *cache = random_floats(n_layer * 2 * S * C);
    float *work = random_floats((6 + 32 * threads) * C);
    float *logits = random_floats(V);
    int wrong = 0;
    for (long n = 0; n < S; n++) {
        float *to = n % 3 ? logits : 0;
        long token = rand() % V;
        token_step(model, cache, to, work, token, n, n_layer, H, C, V, S, threads);
        for (long v = 0; v < V; v++)
            wrong += !isfinite(logits[v]);
    }

    for (long l = 0; l < n_layer; l++) {
        block *b = &model->h[l];
        free_linear(b->c_attn), free_linear(b->c_proj);
        free_linear(b->c_fc), free_linear(b->c_down);
        free((void *)b->ln_1.weight), free((void *)b->ln_1.bias);
        free((void *)b->ln_2.weight), free((void *)b->ln_2.bias);
    }
    free((void *)model->ln_f.weight), free((void *)model->ln_f.bias);
    free(model), free(halves), free(cache), free(work), free(logits);
    return wrong;
}

int main(void)
{
    int wrong = 0;
    for (long out = 64; out <= 256; out += 64)
        for (long in = 16; in <= 272; in += 16)
            wrong += check_layer(out, in, 1 + in / 16 % 3);
    wrong += check_step(1, 1, 64, 1, 1, 1);
    wrong += check_step(2, 64, 64, 17, 9, 2);
    wrong += check_step(1, 3, 192, 70, 20, 3);
    printf("%d\\n", wrong);
}
"""


def sweep(compiler, tmp_path, run=()):
    """What the program above prints: how many results are wrong."""
    program = tmp_path / "sweep.c"
    program.write_text(SWEEP)
    command = [*compiler, f"-I{SOURCE.parent}", str(program), "-lm"]
    command += ["-o", str(tmp_path / "sweep")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr

    result = subprocess.run(
        [*run, str(tmp_path / "sweep")], capture_output=True, text=True, timeout=60
    )
    assert result.stderr == ""
    assert result.returncode == 0
    return result.stdout


WIDTHS = {"native": "-march=native", "AVX2": "-march=x86-64-v3", "plain": ""}


@Beside
def sweeps(folder):
    """What each sweep prints, by the width of the registers. Empty if the compiler has
    no sanitizers."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover", "-fopenmp"]
    empty = folder / "empty.c"
    empty.write_text("int main(void) { return 0; }")
    probe = ["cc", *flags, str(empty), "-o", str(folder / "empty")]
    if (
        shutil.which("cc") is None
        or subprocess.run(probe, capture_output=True).returncode
    ):
        return {}

    command = ["cc", "-O1", "-g", *flags]
    return {name: sweep([*command, *w.split()], folder) for name, w in WIDTHS.items()}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another processor")
@pytest.mark.parametrize("width", WIDTHS)
def test_sanitizers_find_nothing_in_a_sweep_of_shapes(width, has_compiler):
    printed = sweeps()
    if not printed:
        pytest.skip("the compiler has no sanitizers")
    assert printed[width] == "0\n"


ARM = "aarch64-linux-gnu-gcc"
HAS_ARM = shutil.which(ARM) and shutil.which("qemu-aarch64")


@Beside
def sweep_on_arm(folder):
    if HAS_ARM:
        return sweep([ARM, "-O3", "-fopenmp", "-static"], folder, ["qemu-aarch64"])
    return None


@pytest.mark.skipif(not HAS_ARM, reason="there is no cross compiler, or no emulator")
def test_the_sweep_is_right_on_an_emulated_arm():
    assert sweep_on_arm() == "0\n"
