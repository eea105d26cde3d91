"""Which files make the package; everything else about it is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

# configs/ stands beside the package here and within it in a wheel, whose users have no clone.
CONFIGS = "attnres_train.configs"

setup(
    packages=[
        *find_packages(include=["attnres_train*"]),
        CONFIGS,
        *(f"{CONFIGS}.{folder}" for folder in find_namespace_packages("configs")),
    ],
    package_dir={CONFIGS: "configs"},
    package_data={
        "attnres_train": ["py.typed"],
        "attnres_train.reports": ["page.css", "page.js"],
        "": ["*.yaml"],
    },
)
