"""All stages in one process, a stream per stage, edges of device buffers."""
