//! The most that the card does: bytes per second in a copy on the device, and operations per second in products of `bf16`.

use anyhow::{Result, bail};
use serde_json::{Value, json};
use std::time::Instant;
use tpshard_driver::SearchPath;
use tpshard_driver::cublaslt::{CublasLt, Element, Matrix, Product};
use tpshard_driver::cuda::{Device, Driver, Memory};

/// Rounds that are measured; the best counts.
const ROUNDS: usize = 5;

pub(crate) fn measure(small: bool) -> Result<Value> {
    let search = SearchPath::from_environment();
    let driver = Driver::load(&search)?;
    if driver.devices()? == 0 {
        bail!("no GPU is visible");
    }
    let device = driver.device(0)?;
    let (free, total) = device.memory()?;
    let products = match CublasLt::load(&search, &device) {
        Ok(library) => Some(product_rate(&device, &library, if small { 64 } else { 8192 })?),
        Err(error) => {
            eprintln!("bench-gpu: SKIPPED the rate of products: {error}");
            None
        }
    };
    Ok(json!({
        "device": device.name(),
        "arch": device.arch(),
        "memory_bytes": total,
        "free_bytes": free,
        // Every byte is read and written.
        "copy_bytes_per_second": copy_rate(&device, if small { 1 << 20 } else { 4 << 30 })?,
        "bf16_operations_per_second": products,
    }))
}

/// The best time of a few rounds of `calls` calls each, in seconds per call.
fn best(device: &Device, calls: usize, call: &dyn Fn() -> Result<()>) -> Result<f64> {
    call()?;
    device.synchronize()?;
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64() / calls as f64);
    }
    Ok(best)
}

fn copy_rate(device: &Device, bytes: u64) -> Result<f64> {
    let (from, to) = (device.allocate(bytes)?, device.allocate(bytes)?);
    from.clear(0, bytes)?;
    let seconds = best(device, 8, &|| Ok(to.copy(0, &from, 0, bytes)?))?;
    Ok(2.0 * bytes as f64 / seconds)
}

/// Square matrices. Numbers differ from element to element, as zeros cost less power and run faster.
fn product_rate(device: &Device, library: &CublasLt, extent: i64) -> Result<Option<f64>> {
    let bytes = 2 * (extent * extent) as u64;
    let [left, right, result] = [device.allocate(bytes)?, device.allocate(bytes)?, device.allocate(bytes)?];
    let noise: Vec<u8> = (0..bytes / 2).flat_map(|i| noise(i).to_le_bytes()).collect();
    left.upload(0, &noise)?;
    right.upload(0, &noise)?;
    let product = |memory: [&Memory; 3]| -> Result<bool> {
        let [left, right, result] = memory.map(|memory| square(memory, extent));
        let extents = Product {
            element: Element::BF16,
            batch: 1,
            rows: extent,
            columns: extent,
            depth: extent,
            left,
            right,
            result,
        };
        Ok(library.multiply(&extents)?)
    };
    if !product([&left, &right, &result])? {
        eprintln!("bench-gpu: SKIPPED the rate of products: the library has no product of this form");
        return Ok(None);
    }
    let seconds = best(device, 8, &|| product([&left, &right, &result]).map(|_| ()))?;
    Ok(Some(2.0 * (extent as f64).powi(3) / seconds))
}

fn square(memory: &Memory, extent: i64) -> Matrix<'_> {
    Matrix { memory, offset: 0, batch: extent * extent, row: extent, column: 1 }
}

/// A `bf16` between 0.5 and 1 in size, of either sign.
fn noise(index: u64) -> u16 {
    let mixed = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
    let (sign, fraction) = ((mixed as u16) & 0x8000, (mixed as u16) & 0x007f);
    sign | 0x3f00 | fraction
}
