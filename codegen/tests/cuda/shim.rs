//! The shim finds what it is for: barriers that are missing, or that not all threads reach, and faults of data.

use super::case::{case, program};
use super::library::Kernels;
use super::machine::Machine;

/// Kernels of `source` on 256 threads, with one array; what became of it, or how the kernel ended.
fn run(source: &str, seed: Option<u32>) -> Result<Vec<f32>, i32> {
    let folder = tempfile::tempdir().unwrap();
    let prelude = program(&[]).device.unwrap().source;
    let kernels = Kernels::compile(&format!("{prelude}{source}"), folder.path()).unwrap();
    kernels.set_order(seed);
    let mut data = [0f32; 256];
    let mut pointer = data.as_mut_ptr();
    let mut arguments = [std::ptr::from_mut(&mut pointer).cast()];
    match kernels.launch("probe", [1, 1, 1], 256, 0, &mut arguments) {
        0 => Ok(data.to_vec()),
        code => Err(code),
    }
}

const HEAD: &str = "extern \"C\" __global__ void __launch_bounds__(256) probe(float *y) {\n";

#[test]
fn missing_barriers_show() {
    let body = |barrier: &str| {
        format!(
            "{HEAD}SHARED(float, tile, 256);\ntile[threadIdx.x] = threadIdx.x;\n{barrier}\n\
             y[threadIdx.x] = tile[255 - threadIdx.x];\n}}\n"
        )
    };
    let wanted: Vec<f32> = (0..256u16).rev().map(f32::from).collect();
    for seed in [0, 1, 7] {
        assert_eq!(run(&body("__syncthreads();"), Some(seed)).unwrap(), wanted);
        assert_ne!(run(&body(""), Some(seed)).unwrap(), wanted, "order {seed}");
    }
}

#[test]
fn barriers_that_some_threads_miss_are_an_error() {
    let text = format!("{HEAD}if (threadIdx.x < 100) __syncthreads();\ny[threadIdx.x] = 1;\n}}\n");
    assert_eq!(run(&text, Some(0)), Err(2));
    let text = format!(
        "{HEAD}float x = 1;\nif (threadIdx.x % 32 < 5) x = __shfl_xor_sync(0xffffffffu, x, 1);\ny[threadIdx.x] = x;\n}}\n"
    );
    assert_eq!(run(&text, Some(0)), Err(2));
}

#[test]
fn unknown_kernels_are_an_error() {
    let text = "extern \"C\" __global__ void __launch_bounds__(256) other(float *y) {\n}\n";
    assert_eq!(run(text, None), Err(1));
}

#[test]
fn text_that_is_not_c_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Kernels::compile("not C", folder.path()).is_err());
}

#[test]
fn indices_out_of_range_are_noted() {
    let cases = [
        case("s=4", "t: f32[9, 6]\ni: i64[s] 12..13\ngather {axis=0} (0, 1)"),
        case("s=4", "x: i32[s]\ny: i32[s] 0..1\ndiv (0, 1)"),
    ];
    let program = program(&cases);
    let folder = tempfile::tempdir().unwrap();
    let kernels = Kernels::compile(&program.device.as_ref().unwrap().source, folder.path()).unwrap();
    for (order, threads) in [(None, 1), (Some(3), 256)] {
        kernels.set_order(order);
        let mut faults = Vec::new();
        for (index, case) in cases.iter().enumerate() {
            let mut machine = Machine::new(&program, index, &kernels, case, &[]);
            machine.run().unwrap();
            faults.push(machine.fault);
        }
        assert_eq!(faults[0], [1, 2, 12, 9], "{threads} threads");
        assert_eq!(faults[1][..2], [2, 2], "{threads} threads");
    }
}
