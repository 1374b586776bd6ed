"""Problems that can be checked by rule."""

from fathom.tasks.catalogue import open_task
from fathom.tasks.task import Problem, Task

__all__ = ["Problem", "Task", "open_task"]
