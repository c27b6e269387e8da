"""How much memory transfers may take: hf_xet takes a share of the machine's, gigabytes of it, unless it is told otherwise."""

import os

# Read by hf_xet when it is first used. Downloads: buffered between the network and the disk in all, at least and at most for one
# file, and how far ahead of the writer chunks are planned. Uploads: blocks of 64 MB that are on their way at once.
BOUNDS = {
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": "64mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_PERFILE_SIZE": "64mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": "64mb",
    "HF_XET_RECONSTRUCTION_MIN_PREFETCH_BUFFER": "64mb",
    "HF_XET_DATA_MAX_CONCURRENT_FILE_INGESTION": "1",
    "HF_XET_CLIENT_AC_INITIAL_UPLOAD_CONCURRENCY": "2",
    "HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY": "2",
}
_MORE = "HF_XET_HIGH_PERFORMANCE"


def bound_buffers() -> None:
    """Bound the buffers of transfers in this process and those it starts; what the user has set stays.

    Has no effect on a process in which hf_xet was used before.
    """
    if _MORE not in os.environ:
        for name, bound in BOUNDS.items():
            os.environ.setdefault(name, bound)
