//! Tensors in and out: `.npz`, `.npy`, folders of `.npy`, and ONNX `test_data_set_*` folders.

use crate::failure::{Failure, Kind, Outcome};
use std::path::{Path, PathBuf};
use tpshard_runtime::io::{DEFAULT_LIMIT, NamedTensors, read_tensors};

/// One pair of inputs and expected outputs.
pub(crate) struct GoldenPair {
    pub(crate) label: String,
    pub(crate) inputs: PathBuf,
    /// `None` if only the inputs are there.
    pub(crate) outputs: Option<PathBuf>,
}

const HELP: &str = "help: give an .npz file, a folder of .npy files or a test_data_set folder";

fn read_file(path: &Path) -> Outcome<NamedTensors> {
    read_tensors(path, DEFAULT_LIMIT).map_err(|error| {
        let text = error.to_string();
        let help = if text.contains("help: ") { String::new() } else { format!("\n{HELP}") };
        Failure::new(Kind::Resource, format!("{text}{help}"))
    })
}

/// Reads a file, or every `.npy` or `.pb` file of a folder. `names` are the names by position.
pub(crate) fn read(path: &Path, names: &[String]) -> Outcome<NamedTensors> {
    if !path.is_dir() {
        return read_file(path);
    }
    read_numbered(path, "input_", names)
}

/// Reads what [`golden_pairs`] found as expected outputs.
pub(crate) fn read_expected(path: &Path, names: &[String]) -> Outcome<NamedTensors> {
    if path.is_dir() { read_numbered(path, "output_", names) } else { read(path, names) }
}

fn read_numbered(folder: &Path, prefix: &str, names: &[String]) -> Outcome<NamedTensors> {
    let mut tensors = NamedTensors::new();
    for file in sorted_files(folder)? {
        let stem = file.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        match file.extension().and_then(|e| e.to_str()) {
            Some("npy") => {
                tensors.extend(read_file(&file)?);
            }
            Some("pb") => {
                let Some(index) = stem.strip_prefix(prefix).and_then(|i| i.parse::<usize>().ok()) else {
                    continue;
                };
                let bytes = std::fs::read(&file).map_err(|e| unreadable(&file, &e))?;
                let (name, tensor) = tpshard_frontend::read_tensor(&bytes)
                    .map_err(|fault| Failure::new(Kind::Resource, format!("{}: {fault}", file.display())))?;
                let name = match names.get(index) {
                    Some(known) if name.is_empty() || !names.contains(&name) => known.clone(),
                    _ => name,
                };
                tensors.insert(name, tensor);
            }
            _ => {}
        }
    }
    if tensors.is_empty() {
        let message = format!("{}: holds no tensors\n{HELP}", folder.display());
        return Err(Failure::new(Kind::Usage, message));
    }
    Ok(tensors)
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(Kind::Resource, format!("{}: {error}", path.display()))
}

fn sorted_files(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|e| unreadable(folder, &e))?;
    let mut files: Vec<PathBuf> = entries.filter_map(Result::ok).map(|e| e.path()).collect();
    files.sort();
    Ok(files)
}

/// The pairs of a golden folder: `inputs*.npz` with `outputs*.npz` of the same suffix, and `test_data_set_*` folders.
pub(crate) fn golden_pairs(folder: &Path) -> Outcome<Vec<GoldenPair>> {
    let mut pairs = Vec::new();
    for path in sorted_files(folder)? {
        let Some(name) = path.file_name().and_then(|n| n.to_str()).map(str::to_owned) else { continue };
        if let Some(suffix) = name.strip_prefix("inputs").and_then(|n| n.strip_suffix(".npz")) {
            let outputs = folder.join(format!("outputs{suffix}.npz"));
            let outputs = outputs.is_file().then_some(outputs);
            pairs.push(GoldenPair { label: name, inputs: path, outputs });
        } else if name.starts_with("test_data_set") && path.is_dir() {
            let named =
                |file: &PathBuf| file.file_name().is_some_and(|n| n.to_string_lossy().starts_with("output_"));
            let outputs = sorted_files(&path)?.iter().any(named).then(|| path.clone());
            pairs.push(GoldenPair { label: name, inputs: path, outputs });
        }
    }
    if pairs.is_empty() {
        let message = format!(
            "{}: holds no golden pair\nhelp: put inputs.npz and outputs.npz there, or test_data_set_0/input_0.pb …",
            folder.display()
        );
        return Err(Failure::new(Kind::Usage, message));
    }
    Ok(pairs)
}
