"""What is tried while a run is put together: a start ends with the first error, a check gathers them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accel_clip.faults import AccelClipError, ConfigError, DataError

T = TypeVar("T")


class Attempts:
    """Tries one thing after the other, and lets an error rise as it is met."""

    def __len__(self) -> int:
        """Return how many errors were met before: none."""
        return 0

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Return what an action returns, None only where an error of it was gathered."""
        return action()

    def concern(self, setting: str) -> bool:
        """Return whether one of the errors is about a setting."""
        return False


class Problems(Attempts):
    """The errors that looking at one thing after the other has met, each once."""

    def __init__(self) -> None:
        self.errors: list[AccelClipError] = []

    def __len__(self) -> int:
        return len(self.errors)

    def add(self, error: AccelClipError) -> None:
        """Take in an error unless one says the same."""
        if str(error) not in self.messages():
            self.errors.append(error)

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Return what an action returns, or None after taking in the error that it raises."""
        try:
            return action()
        except AccelClipError as error:
            self.add(error)
            return None

    def messages(self) -> list[str]:
        """Return the errors, a line each."""
        return [str(error) for error in self.errors]

    def concern(self, setting: str) -> bool:
        """Return whether one of the errors is about a setting."""
        return any(message.startswith(f"{setting}:") for message in self.messages())

    @property
    def exit_code(self) -> int:
        """Return 0 without problems, 3 when all of them are in the data, else 2."""
        if not self.errors:
            return 0
        only_data = all(isinstance(error, DataError) for error in self.errors)
        return DataError.exit_code if only_data else ConfigError.exit_code
