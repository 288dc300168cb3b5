"""The benchmark: proves each kernel right, then times it beside torch; installed as ``fastdl.bench``."""
