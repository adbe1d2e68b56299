//! What `cargo xtask gpu-test` measures with: models of the shape of a Llama 8B with random weights, and what the card can
//! do at most.
//!
//! `models FOLDER` writes a model for each number of ranks: what rank 0 of so many computes, its heads, its part of the
//! hidden layer and of the vocabulary, without the collectives. One rank of it is what one rank of the whole model does
//! between them. All models share one file of weights, which holds the largest tensor; every tensor is the beginning of it.
//! `ceilings` measures the rate of copies on the device and of products of `bf16`. Both print JSON. `--small` makes
//! everything tiny.

mod ceilings;
mod graph;
mod shape;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use shape::Shape;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// How many ranks there are to be rank 0 of.
const RANKS: [usize; 4] = [1, 2, 4, 8];
const USAGE: &str = "usage: bench-gpu models FOLDER [--layers N] [--small] | ceilings [--small]";
/// Elements of weights that are made at once.
const PIECE: usize = 1 << 16;

fn main() -> Result<()> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let small = take_flag(&mut words, "--small");
    let layers = match words.iter().position(|word| word == "--layers") {
        Some(at) => {
            let value = words.drain(at..words.len().min(at + 2)).nth(1);
            let Some(Ok(layers)) = value.map(|value| value.parse::<usize>()) else { bail!("{USAGE}") };
            Some(layers.max(1))
        }
        None => None,
    };
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["models", folder] => models(Path::new(folder), small, layers)?,
        ["ceilings"] => ceilings::measure(small)?,
        _ => bail!("{USAGE}"),
    };
    println!("{result}");
    Ok(())
}

fn take_flag(words: &mut Vec<String>, flag: &str) -> bool {
    let before = words.len();
    words.retain(|word| word != flag);
    words.len() < before
}

/// Writes the models, their weights and a prompt; what they are.
fn models(folder: &Path, small: bool, layers: Option<usize>) -> Result<Value> {
    std::fs::create_dir_all(folder)?;
    let whole = if small { Shape::small() } else { Shape::llama_8b() };
    let whole = Shape { layers: layers.unwrap_or(whole.layers), ..whole };
    let mut all = Vec::new();
    for ranks in RANKS {
        let share = whole.share(ranks);
        let name = format!("share-{ranks}.onnx");
        std::fs::write(folder.join(&name), graph::model(&share))?;
        let mut described = share.to_json();
        described["ranks"] = ranks.into();
        described["model"] = name.into();
        all.push(described);
    }
    write_weights(&folder.join(graph::WEIGHTS), whole.largest())?;
    write_prompt(folder, &whole)?;
    Ok(json!({ "prompt": whole.prompt, "shares": all }))
}

/// Numbers between -0.03 and 0.03, in which sums of thousands of products stay small.
fn write_weights(path: &Path, count: usize) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut piece = Vec::with_capacity(4 * PIECE);
    let mut rest = count;
    while rest > 0 {
        piece.clear();
        for _ in 0..rest.min(PIECE) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let unit = (state >> 40) as f32 / (1u32 << 24) as f32;
            piece.extend_from_slice(&(0.06 * unit - 0.03).to_le_bytes());
        }
        file.write_all(&piece)?;
        rest -= rest.min(PIECE);
    }
    file.flush()?;
    Ok(())
}

/// Tokens that every share has, as `inputs/input_ids.npy`.
fn write_prompt(folder: &Path, whole: &Shape) -> Result<()> {
    let folder = folder.join("inputs");
    std::fs::create_dir_all(&folder)?;
    let words = RANKS.map(|ranks| whole.share(ranks).vocabulary).into_iter().min().unwrap_or(1);
    let mut header = format!("{{'descr': '<i8', 'fortran_order': False, 'shape': (1, {}), }}", whole.prompt);
    let length = (10 + header.len() + 1).next_multiple_of(64) - 10;
    header.push_str(&" ".repeat(length - header.len() - 1));
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend_from_slice(&u16::try_from(header.len())?.to_le_bytes());
    file.extend_from_slice(header.as_bytes());
    for place in 0..whole.prompt {
        file.extend_from_slice(&((place * 7919 % words) as i64).to_le_bytes());
    }
    std::fs::write(folder.join("input_ids.npy"), file)?;
    Ok(())
}
