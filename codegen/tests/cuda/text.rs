//! The text of kernels: what it looks like, and that NVIDIA's compiler takes it where it is installed.

use super::case::{case, program};
use std::path::PathBuf;
use std::time::Instant;
use tpshard_driver::SearchPath;
use tpshard_driver::nvrtc::Nvrtc;
use tpshard_ir::program::RankProgram;

/// The kernels of a program, without what all share.
fn own_text(program: &RankProgram) -> String {
    let source = &program.device.as_ref().unwrap().source;
    let start = source.find("\nextern \"C\" __global__").unwrap_or(source.len());
    source[start..].trim_start().to_string()
}

/// A tiny layer: norm, projection, gate, residual.
const LAYER: &str = "x: f32[seq, 8]
    w: f32[8]
    norm {kind=rms, axis=1, epsilon=0.00001} (0, 1)
    p: f32[8, 16]
    einsum \"sk,kn->sn\" (2, 3)
    sigmoid (4)
    mul (4, 5)
    q: f32[16, 8]
    einsum \"sk,kn->sn\" (6, 7)
    add (0, 8)";

#[test]
fn kernels_are_readable() {
    let text = own_text(&program(&[case("seq=3", LAYER)]));
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/layer.cu");
    if std::env::var_os("TPSHARD_BLESS").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    let wanted = std::fs::read_to_string(&file).unwrap_or_default();
    assert_eq!(text, wanted, "TPSHARD_BLESS=1 writes {} anew", file.display());
}

/// Text that is equal for every number of layers.
#[test]
fn layers_share_their_kernels() {
    let with_layers = |count: usize| {
        let program = program(&[case("seq=3", &layers(count, "f32"))]);
        (
            program.device.as_ref().unwrap().source.clone(),
            program.entries[0].device.clone().unwrap().steps.len(),
        )
    };
    let ((one, few), (many, steps)) = (with_layers(2), with_layers(96));
    assert_eq!(one, many);
    assert!(steps > few * 20);
}

/// Decoder layers of attention and a gated network, of different weights.
fn layers(count: usize, dtype: &str) -> String {
    let mut text =
        format!("x: {dtype}[1, seq, 64]\ncos: {dtype}[1, 1, seq, 8]\nsin: {dtype}[1, 1, seq, 8]\n");
    let (mut next, mut x) = (3, 0);
    let mut line = |content: String| {
        text += &content;
        text.push('\n');
        next += 1;
        next - 1
    };
    for layer in 0..count {
        let weight = |line: &mut dyn FnMut(String) -> usize, name: &str, shape: &str| {
            line(format!("weight init(\"{name}{layer}\", {dtype}, [{shape}]) ()"))
        };
        let scale = weight(&mut line, "norm", "64");
        let normed = line(format!("norm {{kind=rms, axis=2, epsilon=0.00001}} ({x}, {scale})"));
        let mut heads = Vec::new();
        for (name, width) in [("q", 64), ("k", 32), ("v", 32)] {
            let w = weight(&mut line, name, &format!("64, {width}"));
            let flat = line(format!("einsum \"bsk,kn->bsn\" ({normed}, {w})"));
            let split = line(format!("reshape {{shape=[1, seq, {}, 16]}} ({flat})", width / 16));
            let moved = line(format!("transpose {{perm=[0, 2, 1, 3]}} ({split})"));
            heads.push(if name == "v" {
                moved
            } else {
                line(format!("rotary {{interleaved=false}} ({moved}, 1, 2)"))
            });
        }
        let attended = line(format!(
            "attention {{scale=0.25, softcap=none, kv_of_head=[0, 0, 1, 1], empty_rows_zero=false}} ({}, {}, {})",
            heads[0], heads[1], heads[2]
        ));
        let moved = line(format!("transpose {{perm=[0, 2, 1, 3]}} ({attended})"));
        let flat = line(format!("reshape {{shape=[1, seq, 64]}} ({moved})"));
        let w = weight(&mut line, "o", "64, 64");
        let projected = line(format!("einsum \"bsk,kn->bsn\" ({flat}, {w})"));
        let middle = line(format!("add ({x}, {projected})"));
        let (gate, up) = (weight(&mut line, "gate", "64, 96"), weight(&mut line, "up", "64, 96"));
        let gate = line(format!("einsum \"bsk,kn->bsn\" ({middle}, {gate})"));
        let up = line(format!("einsum \"bsk,kn->bsn\" ({middle}, {up})"));
        let sigmoid = line(format!("sigmoid ({gate})"));
        let silu = line(format!("mul ({gate}, {sigmoid})"));
        let product = line(format!("mul ({silu}, {up})"));
        let down = weight(&mut line, "down", "96, 64");
        let down = line(format!("einsum \"bsk,kn->bsn\" ({product}, {down})"));
        x = line(format!("add ({middle}, {down})"));
    }
    text
}

/// Whole layers, run.
#[test]
fn decoder_layers_run() {
    super::families::check(&[case("seq=5", &layers(2, "f32")), case("seq=1", &layers(1, "f32"))], 0);
}

/// The compiler, if it is installed; `TPSHARD_REQUIRE` naming `nvrtc` makes a skip a failure.
fn compiler() -> Option<Nvrtc> {
    let required = std::env::var("TPSHARD_REQUIRE").is_ok_and(|names| names.split(',').any(|n| n == "nvrtc"));
    match Nvrtc::load(&SearchPath::from_environment()) {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) if required => panic!("{error}"),
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

/// All families for one architecture, a part of them for the others.
#[test]
fn nvrtc_takes_every_family() {
    let Some(nvrtc) = compiler() else { return };
    for (arch, step) in [(80, 40), (90, 4), (100, 40)] {
        let cases: Vec<_> = super::families::samples().into_iter().step_by(step).collect();
        let code = super::case::attached(&cases).device.unwrap();
        let start = Instant::now();
        let cubin = nvrtc.compile(&code.source, arch, &[]).unwrap_or_else(|error| panic!("{error}"));
        let (seconds, kernels) = (start.elapsed().as_secs_f64(), code.kernels.len());
        eprintln!("sm_{arch}: {kernels} kernels, {} bytes, {seconds:.2} s", cubin.len());
        assert!(step < 10 || cubin == nvrtc.compile(&code.source, arch, &[]).unwrap());
    }
}

/// What 96 layers take is what one takes.
#[test]
fn nvrtc_compiles_96_layers_in_seconds() {
    let Some(nvrtc) = compiler() else { return };
    let program = program(&[case("seq=3", &layers(96, "bf16"))]);
    let start = Instant::now();
    nvrtc.compile(&program.device.as_ref().unwrap().source, 90, &[]).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    eprintln!("96 layers, sm_90: {} kernels, {seconds:.2} s", program.device.as_ref().unwrap().kernels.len());
    assert!(seconds < 30.0);
}
