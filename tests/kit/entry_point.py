"""A tiny entry point: what a container runtime is asked for, by Katapod's public names alone.

It keeps the containers that it has created by name, as a program that serves requests would.
"""

import contextlib
from typing import Unpack

import katapod

__all__ = ["EntryPoint"]


class EntryPoint:
    """create, start, wait, kill, exec, delete, and what is there. Errors are Katapod's own."""

    def __init__(self) -> None:
        self.containers: dict[str, katapod.Container] = {}
        self._lives: dict[str, contextlib.AsyncExitStack] = {}

    async def create(
        self, name: str, image: katapod.ImageSource, *command: str, **options: Unpack[katapod.Options]
    ) -> None:
        if name in self.containers:
            raise katapod.AlreadyExists(f"cannot create {name}: it exists already")
        made = katapod.Container.create(image, *command, name=name, **options)
        async with contextlib.AsyncExitStack() as stack:
            self.containers[name] = await stack.enter_async_context(made)
            self._lives[name] = stack.pop_all()

    def find(self, name: str) -> katapod.Container:
        if name not in self.containers:
            raise katapod.NotFound(f"cannot find {name}: it was not created here")
        return self.containers[name]

    async def start(self, name: str) -> katapod.Process:
        return await self.find(name).start(stdin=katapod.PIPE, stdout=katapod.PIPE, stderr=katapod.PIPE)

    async def wait(self, name: str) -> int:
        return await self.find(name).wait()

    async def kill(self, name: str, signal: str = "KILL") -> None:
        await self.find(name).kill(signal)

    async def exec(self, name: str, *command: str, input: bytes = b"") -> katapod.Completed:
        return await self.find(name).run(*command, input=input)

    def state(self, name: str) -> str:
        return self.find(name).info().state.value

    async def delete(self, name: str) -> None:
        """Ends what still runs."""
        self.find(name)
        del self.containers[name]
        await self._lives.pop(name).aclose()

    async def close(self) -> None:
        for name in list(self.containers):
            await self.delete(name)
