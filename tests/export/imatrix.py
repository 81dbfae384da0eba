"""Files as llama-imatrix writes them: sums of the squares of what went into each weight, and of how many inputs."""

import struct

import gguf


def write_gguf(path, sums, counts):
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt", "möre.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    for name in sums:
        writer.add_tensor(f"{name}.in_sum2", sums[name])
        writer.add_tensor(f"{name}.counts", counts[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat(path, sums, calls):
    entry = lambda name: (
        struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, sums[name].size)
    )
    path.write_bytes(
        struct.pack("<i", len(sums))
        + b"".join(entry(name) + sums[name].tobytes() for name in sums)
        + struct.pack("<ii", 7, 4)
        + b"text"
    )
    return path
