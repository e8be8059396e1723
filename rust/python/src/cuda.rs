//! Device code for Python to compile: the tree `cuda/`, embedded when this crate was built, and its flattening.
//!
//! `TILEWISE_CUDA_SOURCE_DIR` names a directory to read instead, so that an edit needs no rebuild.

use crate::door::to_python;
use pyo3::prelude::*;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use tilewise_core::error::Error;
use tilewise_core::source;

// static FILES: &[(&str, &str)], by path under cuda/, ascending.
include!(concat!(env!("OUT_DIR"), "/cuda_files.rs"));

const OVERRIDE: &str = "TILEWISE_CUDA_SOURCE_DIR";

/// Where sources come from: the embedded tree or a directory.
enum Tree {
    Embedded,
    Directory(PathBuf),
}

impl Tree {
    fn chosen() -> Result<Self, Error> {
        let Some(path) = std::env::var_os(OVERRIDE).filter(|value| !value.is_empty()).map(PathBuf::from) else {
            return Ok(Self::Embedded);
        };
        if path.is_dir() {
            return Ok(Self::Directory(path));
        }
        let error = Error::value(OVERRIDE, "a directory with the sources of cuda/", path.display());
        Err(error.hint("unset it to use the sources that came with tilewise"))
    }

    fn read(&self, name: &str) -> Option<String> {
        match self {
            Self::Embedded => FILES.iter().find(|(file, _)| *file == name).map(|(_, text)| text.to_string()),
            Self::Directory(root) => fs::read_to_string(root.join(name)).ok(),
        }
    }

    fn names(&self) -> Vec<String> {
        match self {
            Self::Embedded => FILES.iter().map(|(name, _)| name.to_string()).collect(),
            Self::Directory(root) => {
                let mut names = Vec::new();
                walk(root, "", &mut names);
                names.sort();
                names
            }
        }
    }
}

fn walk(directory: &Path, prefix: &str, names: &mut Vec<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = entry.path();
        if path.is_dir() {
            walk(&path, &format!("{prefix}{name}/"), names);
        } else if name.ends_with(".cuh") || name.ends_with(".cu") {
            names.push(format!("{prefix}{name}"));
        }
    }
}

/// SHA-256 over the entry's name, the stub, and the name and bytes of every file, each with its length in front.
fn digest(entry: &str, stub: &str, files: &[(String, String)]) -> String {
    let mut hash = Sha256::new();
    let parts = [entry, stub].into_iter().chain(files.iter().flat_map(|(name, text)| [name.as_str(), text.as_str()]));
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One text for a compiler, and the digest of every byte that shaped it.
///
/// `entry` is a path under `cuda/`; `stub` is appended, usually the line that instantiates a kernel.
#[pyfunction]
fn cuda_source(py: Python<'_>, entry: &str, stub: &str) -> PyResult<(String, String)> {
    let tree = Tree::chosen().map_err(|error| to_python(py, &error))?;
    let flat = source::flatten(entry, stub, &|name| tree.read(name)).map_err(|error| {
        let allowed = "device code whose every #include \"...\" names another file under cuda/, unconditionally";
        let error = Error::value("cuda source", allowed, error);
        to_python(py, &error.hint(format!("the files are {}", tree.names().join(", "))))
    })?;
    let digest = digest(entry, stub, &flat.files);
    Ok((flat.text, digest))
}

/// Paths of all device sources under `cuda/`, ascending.
#[pyfunction]
fn cuda_files(py: Python<'_>) -> PyResult<Vec<String>> {
    Ok(Tree::chosen().map_err(|error| to_python(py, &error))?.names())
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cuda_source, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_files, module)?)
}
