"""A training step whose work on a GPU is recorded once and then replayed.

A step is some thousand short pieces of work, and to start them one by one takes the
processor longer than the GPU needs for them. A CUDA graph starts them all at once. It
holds forward and backward; clipping and AdamW, which take all tensors at a time, stay
outside. A replay runs no Python: nothing in the step may depend on a value. Dropout
follows torch.manual_seed as it does without a graph.
"""

from dataclasses import replace

import torch


class CudaGraph:
    """What function() does on the GPU. A replay fills its outputs, tensors, anew."""

    def __init__(self, function):
        # Compilers need a first call. In the second one it is an error to wait for the
        # GPU, which cannot be recorded.
        caller = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            function()
            torch.cuda.set_sync_debug_mode("error")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode("default")
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

        self.batch.copy_(torch.stack((ids, targets)))
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
            # Dropout draws random numbers in the calls before, too.
            with torch.random.fork_rng([batch.device] if batch.is_cuda else []):
                self.graph = self.graph_of(compute)
        except RuntimeError as error:
            student.zero_grad()
            print(f"the step is not captured: {str(error).splitlines()[0]}", flush=True)
