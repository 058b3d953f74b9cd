"""osbuilder: builds the guest images (kernel with initrd or system disk) on the node, from what is installed there.

    build_guest_image(ImageRequest(...), prove=...)  ->  BuiltImage
    read_recipe(FILE)  ->  what is added to it
    prune_images(DIRECTORY)  ->  the images that were removed

`plan.guest_image` decides on the content; `facts`, `guest_python`, `node_files` and `packages` inspect the node;
`stage` lays out the files and has dracut pack them; `module_file` takes from kernel modules what guests do not need;
`vmlinux` extracts the kernel from its bzImage; `system_disk` makes a disk of the archive for User-mode Linux, and
`uml_proof` test-boots it; `cache` keeps the finished images; `build` runs these steps. Used by cli/ only. Knows nothing
about sandboxes: the caller passes in how to test-boot an image.
"""

from katapod.osbuilder.build import ImageRequest, Progress, Prove, build_guest_image
from katapod.osbuilder.cache import BuiltImage, current_image, current_images, list_images
from katapod.osbuilder.errors import (
    ImageNotProven,
    KernelMissing,
    KernelUnusable,
    OsbuilderError,
    SpaceMissing,
)
from katapod.osbuilder.kernel import InstalledKernel, find_kernel, find_uml_kernel
from katapod.osbuilder.prune import prune_images
from katapod.osbuilder.recipe_file import read_recipe
from katapod.osbuilder.uml_proof import prove_uml

__all__ = [
    "BuiltImage",
    "ImageNotProven",
    "ImageRequest",
    "InstalledKernel",
    "KernelMissing",
    "KernelUnusable",
    "OsbuilderError",
    "Progress",
    "Prove",
    "SpaceMissing",
    "build_guest_image",
    "current_image",
    "current_images",
    "find_kernel",
    "find_uml_kernel",
    "list_images",
    "prove_uml",
    "prune_images",
    "read_recipe",
]
