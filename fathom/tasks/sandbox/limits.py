"""What a program may use."""

from pydantic import Field

from fathom.config.section import Section


class Limits(Section):
    """What one execution of a program may use; how many processes is no setting, for it is always one."""

    cpu_seconds: int = Field(2, ge=1)
    """Processor time of one execution; beyond it the kernel kills the program."""
    wall_seconds: float = Field(6.0, gt=0)
    """Time for a whole check by the clock, all its executions together, from when a worker is free for it."""
    memory_mb: int = Field(256, ge=64)
    """Address space in MiB, of which Python itself takes some 30."""
    files_mb: int = Field(16, ge=1)
    """All files in the private /tmp together in MiB; also the largest file."""
    open_files: int = Field(32, ge=16)
    """File descriptors open at a time."""
    output_kb: int = Field(64, ge=1)
    """What a program may print per execution, or return per check, in KiB; more ends the check."""
