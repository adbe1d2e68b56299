//! Telling what a file is when it is not a model.
//!
//! Most "broken models" are intact files of another kind: a Git LFS pointer, a web page saved as a model, an archive.
//! Each gets its own message, because the remedy differs.

use crate::error::Fault;

/// A fault if the content is recognisably something other than ONNX.
pub(crate) fn refuse_other_formats(content: &[u8]) -> Result<(), Fault> {
    let Some(&first) = content.first() else {
        return Err(Fault::invalid("the file is empty", "download or export the model again"));
    };
    if content.starts_with(b"version https://git-lfs") {
        return Err(Fault::invalid(
            "this is a Git LFS pointer, not the model itself",
            "run `git lfs pull` in the repository it came from, or download the file with `hf download`",
        ));
    }
    for (magic, what, help) in MAGIC {
        if content.starts_with(magic) {
            return Err(Fault::invalid(format!("this is {what}, not an ONNX model"), *help));
        }
    }
    if content.len() > 8 && content[8] == b'{' && content[..8].ends_with(&[0, 0, 0]) {
        return Err(Fault::invalid("this is a safetensors file: weights without a graph", EXPORT));
    }
    if content.get(4..8) == Some(b"ORTM".as_slice()) {
        return Err(Fault::unsupported(
            "this is an ORT-format model, not ONNX",
            "use the .onnx file it was made from",
        ));
    }
    refuse_text(first, content)
}

const EXPORT: &str =
    "export the model to ONNX first, for example with `torch.onnx.export` or `optimum-cli export onnx`";
const UNPACK: &str = "unpack it and pass the .onnx file inside";

const MAGIC: &[(&[u8], &str, &str)] = &[
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (
        b"PK\x03\x04",
        "a zip archive (a PyTorch checkpoint, perhaps)",
        "unpack it, or export the checkpoint to ONNX",
    ),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", UNPACK),
    (b"BZh", "a bzip2 archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (b"\x7fELF", "an executable", "pass the .onnx file"),
    (b"GGUF", "a GGUF model", EXPORT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (a Keras model, perhaps)", EXPORT),
    (b"\x93NUMPY", "a NumPy array", "pass the .onnx file; arrays are given with --input"),
    (b"\x80\x02", "a Python pickle (a PyTorch checkpoint, perhaps)", EXPORT),
    (b"\x80\x04", "a Python pickle", EXPORT),
];

/// Text never decodes to a model, but the decoder's complaint about it would be obscure.
fn refuse_text(first: u8, content: &[u8]) -> Result<(), Fault> {
    let head = &content[..content.len().min(512)];
    let printable =
        head.iter().filter(|&&b| matches!(b, b'\t' | b'\n' | b'\r' | 0x20..=0x7e) || b >= 0x80).count();
    if printable != head.len() || std::str::from_utf8(&head[..head.len().saturating_sub(3)]).is_err() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(head).trim_start_matches('\u{feff}').trim_start().to_ascii_lowercase();
    if text.starts_with("<!doctype html") || text.starts_with("<html") || text.starts_with("<head") {
        return Err(Fault::invalid(
            "this is a web page, not a model",
            "the download address led to a page; use the address of the raw file",
        ));
    }
    if text.starts_with("ir_version:") || text.starts_with("ir_version ") || text.starts_with("graph {") {
        return Err(Fault::unsupported(
            "this is an ONNX model in protobuf text form",
            "convert it: `onnx.save(onnx.load(path, format='textproto'), 'model.onnx')`",
        ));
    }
    if text.starts_with('<') {
        return Err(Fault::invalid("this is XML, not an ONNX model", "pass the .onnx file"));
    }
    if text.starts_with('{') || text.starts_with('[') {
        return Err(Fault::invalid("this is JSON, not an ONNX model", "pass the .onnx file"));
    }
    // A model starts with the tag of `ir_version`; a text that starts with a tab or a line feed might be a message.
    if first >= 0x20 || text.is_empty() {
        return Err(Fault::invalid("this is a text file, not an ONNX model", "pass the .onnx file"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(content: &[u8]) -> String {
        refuse_other_formats(content).unwrap_err().to_string()
    }

    #[test]
    fn common_mistakes_are_told_apart() {
        assert!(message(b"").contains("empty"));
        assert!(message(b"version https://git-lfs.github.com/spec/v1\noid").contains("git lfs pull"));
        assert!(message(b"\x1f\x8b\x08\0").contains("gzip"));
        assert!(message(b"PK\x03\x04\0").contains("zip archive"));
        assert!(message(b"\n<!DOCTYPE html><html>").contains("web page"));
        assert!(message(b"{\"error\": 404}").contains("JSON"));
        assert!(message(b"Entry not found").contains("text file"));
        assert!(message(b"ir_version: 8\ngraph {").contains("text form"));
        assert!(message(b"\x18\0\0\0ORTM....").contains("ORT-format"));
        assert!(message(b"\x50\x01\0\0\0\0\0\0{\"__metadata__\"").contains("safetensors"));
    }

    #[test]
    fn protobuf_passes() {
        refuse_other_formats(b"\x08\x08\x12\x07pytorch\x3a\0").unwrap();
        refuse_other_formats(b"\x3a\x04\x0a\x02\x22\0").unwrap();
    }
}
