"""A script as a program, in a process that is forked from one in which everything is imported already."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parent.parent
SCRIPTS = ["sac_continuous", "mfpo_continuous", "smfp_continuous"]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.faulty", *SCRIPTS])  # to import them takes three seconds of a core


def execute(script, folder, line, out, err, before):
    os.chdir(folder)
    os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    path = str(ROOT / f"{script}.py")
    sys.path[0], sys.argv = str(ROOT), [path, *line]
    if before:
        before()
    runpy.run_path(path, run_name="__main__")


class Program(context.Process):
    """`python <script>.py <line>` in `folder`, with its output in pipes; `before` is called first, in the process."""

    def __init__(self, script, folder, *line, before=None):
        (out, its_out), (err, its_err) = (multiprocessing.Pipe(duplex=False) for _ in range(2))
        line = tuple(map(str, line))
        super().__init__(target=execute, args=(script, str(folder), line, its_out, its_err, before))
        self.start()
        its_out.close(), its_err.close()
        self.stdout, self.stderr = (open(os.dup(pipe.fileno())) for pipe in (out, err))  # noqa: SIM115

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self):
        """The rest of its output and errors; it has ended then."""
        texts = self.stdout.read(), self.stderr.read()
        self.join()
        return texts


def run_program(script, folder, *line, before=None):
    """Like subprocess.run."""
    program = Program(script, folder, *line, before=before)
    out, err = program.communicate()
    return CompletedProcess(line, program.exitcode, out, err)
