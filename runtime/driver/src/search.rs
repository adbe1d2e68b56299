//! Where NVIDIA's libraries are looked for: the folders of `TPSHARD_CUDA_PATH` first, then the folders of toolkits, then
//! those of Python packages, then by name, wherever the system's loader looks.

use std::path::{Path, PathBuf};

/// Folders, separated by colons, that are looked into before all others.
pub const LIBRARY_PATH_VARIABLE: &str = "TPSHARD_CUDA_PATH";

/// Most folders of Python installations that are looked into.
const MAX_PYTHONS: usize = 16;

/// Where toolkits and distributions put libraries.
const SYSTEM_FOLDERS: [&str; 9] = [
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/targets/x86_64-linux/lib",
    "/usr/local/cuda/targets/sbsa-linux/lib",
    "/opt/cuda/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib/wsl/lib",
    "/usr/local/nvidia/lib64",
];

/// Where NVIDIA's Python packages keep libraries, below `site-packages`.
const PACKAGE_FOLDERS: [&str; 5] =
    ["nvidia/cu13/lib", "nvidia/cu12/lib", "nvidia/cuda_nvrtc/lib", "nvidia/cublas/lib", "nvidia/nccl/lib"];

/// Folders, in the order they are looked into.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SearchPath {
    folders: Vec<PathBuf>,
}

impl SearchPath {
    /// The folders of this process's environment.
    pub fn from_environment() -> SearchPath {
        let variable = |name: &str| std::env::var_os(name);
        let own = variable(LIBRARY_PATH_VARIABLE).unwrap_or_default();
        let mut folders: Vec<PathBuf> =
            std::env::split_paths(&own).filter(|p| !p.as_os_str().is_empty()).collect();
        for root in ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable) {
            folders.push(Path::new(&root).join("lib64"));
        }
        folders.extend(SYSTEM_FOLDERS.map(PathBuf::from));
        let roots = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable).map(PathBuf::from);
        let roots: Vec<PathBuf> = roots.chain([PathBuf::from("/usr/local"), PathBuf::from("/usr")]).collect();
        for packages in roots.iter().flat_map(|root| python_packages(root)).take(MAX_PYTHONS) {
            folders.extend(PACKAGE_FOLDERS.iter().map(|folder| packages.join(folder)));
        }
        SearchPath { folders }
    }

    /// The same, after looking into `folders`.
    pub fn after(self, folders: &[PathBuf]) -> SearchPath {
        SearchPath { folders: folders.iter().cloned().chain(self.folders).collect() }
    }

    /// These folders and the system's loader only.
    pub fn of(folders: Vec<PathBuf>) -> SearchPath {
        SearchPath { folders }
    }

    /// Folders that exist, in order.
    pub(crate) fn existing(&self) -> impl Iterator<Item = &Path> {
        self.folders.iter().map(PathBuf::as_path).filter(|folder| folder.is_dir())
    }
}

/// The folders of installed packages below the root of a Python installation, newest version first.
fn python_packages(root: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    let entries = std::fs::read_dir(root.join("lib")).into_iter().flatten().flatten();
    let mut pythons: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
        .map(|entry| entry.path())
        .collect();
    pythons.sort();
    for python in pythons.into_iter().rev() {
        found.extend(["site-packages", "dist-packages"].map(|name| python.join(name)));
    }
    found.retain(|folder| folder.join("nvidia").is_dir());
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_of_a_python_are_found_newest_first() {
        let root = tempfile::tempdir().unwrap();
        for python in ["python3.11", "python3.12", "other"] {
            let nvidia = root.path().join("lib").join(python).join("site-packages/nvidia");
            std::fs::create_dir_all(nvidia).unwrap();
        }
        std::fs::create_dir_all(root.path().join("lib/python3.9/site-packages")).unwrap();
        let found = python_packages(root.path());
        let expected =
            ["python3.12", "python3.11"].map(|p| root.path().join("lib").join(p).join("site-packages"));
        assert_eq!(found, expected);
        assert!(python_packages(&root.path().join("nothing")).is_empty());
    }
}
