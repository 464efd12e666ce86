"""One package for pip and for colcon (ament_python)."""

import re
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

NAME = "laws_ros"
ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / NAME / "__init__.py").read_text(), re.M).group(1)

# From release 4 on, `mujoco` adds viewers and OpenGL to `mujoco-core`, 45 MB that no robot needs.
MUJOCO = ["mujoco-core>=4; python_version >= '3.11'", "mujoco; python_version < '3.11'"]
GYM = ["gymnasium[box2d,mujoco]"]
# Wheels of ROS 2 Kilted exist for x86-64 only; elsewhere, and on robots, rclpy comes with ROS itself.
ROS = [
    f"{wheel}; sys_platform == 'linux' and platform_machine == 'x86_64'"
    for wheel in [
        "ros-rclpy[fastrtps]>=9.1,<10",
        "ros-diagnostic-msgs",
        "ros-geometry-msgs",
        "ros-lifecycle-msgs",
        "ros-rosgraph-msgs",
        "ros-sensor-msgs",
        "ros-std-msgs",
        "ros-std-srvs",
        "ros-trajectory-msgs",
    ]
]

# The arm's black-box twin, 17 MB, is for studies from a checkout.
INSTALLED = {kind: sorted(glob(f"{kind}/*.*")) for kind in ("launch", "config", "sim", "models")}
INSTALLED["models"] = [file for file in INSTALLED["models"] if "diffusion" not in file]

FLEET = ["fsspec", "tuf>=6", "securesystemslib[crypto]"]

setup(
    name=NAME,
    version=VERSION,
    description="Certified policy caching for ROS 2: a library of experts with proven error bounds",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    install_requires=["numpy", "onnx", "onnxruntime", "pyyaml", "numba"],
    extras_require={
        "sim": [*MUJOCO, "rich", "rosbags"],
        "gym": GYM,
        "train": [*MUJOCO, *GYM, "scipy", "torch", "array-api-compat"],
        "plot": ["matplotlib", "pillow", "pyopengl"],
        "docs": ["sphinx", "furo", "myst-parser"],
        "fleet": FLEET,
        "cluster": ["ray"],
        "ros": ROS,
        # Any new release of ruff may bring rules that an unchanged tree breaks.
        "test": [
            *FLEET,
            *(
                "aiohttp",
                "mcap",
                "matplotlib",
                "pillow",
                "pytest",
                "pytest-cov",
                "hypothesis",
                "ruff==0.17.*",
                "mypy",
                "types-PyYAML",
            ),
        ],
    },
    entry_points={"console_scripts": [f"laws = {NAME}.cli:main"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        *((f"share/{NAME}/{kind}", files) for kind, files in INSTALLED.items()),
        # pip's console scripts go to bin/, where `ros2 run` and launch's Node() never look.
        (f"lib/{NAME}", sorted(glob("scripts/*"))),
    ],
    zip_safe=False,
)
