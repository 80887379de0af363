"""A training step whose work on a GPU is recorded once and then replayed.

A step is some thousand short pieces of work, and to start them one by one takes the
processor longer than the GPU needs for them. A CUDA graph starts all of forward and
backward at once. Nothing in it may depend on a value: a replay runs no Python.
"""

from dataclasses import replace

import torch


class CudaGraph:
    """What function() does on the GPU. A replay fills its outputs, tensors, anew."""

    def __init__(self, function):
        # Compilers need a first call. In a second one, which is told that it is being
        # recorded, it is an error to wait for the GPU.
        caller = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        stream.wait_stream(caller)
        is_capturing = torch.cuda.is_current_stream_capturing
        with torch.cuda.stream(stream):
            function()
            torch.cuda.is_current_stream_capturing = lambda: True
            torch.cuda.set_sync_debug_mode("error")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.is_current_stream_capturing = is_capturing
        caller.wait_stream(stream)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(caller), torch.cuda.graph(graph):
            self.outputs = function()
        self.replay = graph.replay


class Captured:
    """Stands in for the `backward` of tsld.train, with its loss and its gradient,
    which replaces what .grad held. Where the step cannot be recorded, a line says why,
    and it is taken as it is. graph_of(function) makes a graph, as CudaGraph does."""

    def __init__(self, backward, graph_of=CudaGraph):
        self.backward = backward
        self.graph_of = graph_of
        self.recorded = None  # what the graph is of

    def __call__(self, student, teacher, ids, targets, config):
        step = (student, teacher, ids.shape, replace(config))
        if self.recorded != step:
            self.record(student, teacher, torch.stack((ids, targets)), config)
            self.recorded = step
        if self.graph is None:
            return self.backward(student, teacher, ids, targets, config)

        torch.stack((ids, targets), out=self.batch)
        self.graph.replay()
        loss, *gradients = self.graph.outputs
        for parameter, gradient in zip(student.parameters(), gradients):
            parameter.grad = gradient
        return loss.clone()

    def record(self, student, teacher, batch, config):
        def compute():
            student.zero_grad()
            loss = self.backward(student, teacher, *batch, config)
            gradients = [parameter.grad for parameter in student.parameters()]
            student.zero_grad()
            return loss, *gradients

        self.batch = batch
        self.graph = None  # frees the memory of the one before
        try:
            with torch.random.fork_rng([batch.device] if batch.is_cuda else []):
                self.graph = self.graph_of(compute)  # which calls it for a trial
        except RuntimeError as error:
            student.zero_grad()
            print(f"the step is not captured: {str(error).splitlines()[0]}", flush=True)
