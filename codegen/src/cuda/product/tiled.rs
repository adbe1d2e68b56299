//! Products of many rows, in tiles that pass through shared memory.

use super::{LEFT, RESULT, RIGHT, THREADS, Task, at, place};
use crate::cuda::emit::Emitter;
use crate::cuda::text::{Call, load, store, wide_type};
use tpshard_ir::Dim;
use tpshard_ir::program::device::Launch;

/// Rows and columns of a tile.
const TILE: i64 = 64;

/// Tiles of 64 rows and columns, in steps of 16 along the depth; a thread holds 4 by 4 results.
///
/// A block of fewer threads takes the places of 256 in turn, so the depth is walked again for each.
///
/// `when` is 1 or 0: whether there is anything to do.
pub(super) fn tiled(emitter: &mut Emitter<'_>, task: &Task, when: &Dim) -> Launch {
    let Task { value, dtype, groups, .. } = task;
    let (wide, batches) = (wide_type(*dtype), groups.batch.count());
    let mut call = Call::new();
    task.arrays(&mut call);
    call.write("y", *dtype, *value, &task.offset);
    let (rows, columns) = (groups.rows.count(), groups.columns.count());
    let (row_count, column_count) = (call.variable(&rows), call.variable(&columns));
    let depth = call.variable(&groups.depth.count());
    call.line(format!("SHARED({wide}, left_tile, 16 * 65);"));
    call.line(format!("SHARED({wide}, right_tile, 16 * 65);"));
    let batch_count = call.variable(&batches);
    call.line(format!("for (i64 batch = blockIdx.z; batch < {batch_count}; batch += gridDim.z) {{"));
    task.batch_places(&mut call);
    call.line(format!("for (i64 row0 = blockIdx.y * 64LL; row0 < {row_count}; row0 += gridDim.y * 64LL) {{"));
    call.line(format!(
        "for (i64 column0 = blockIdx.x * 64LL; column0 < {column_count}; column0 += gridDim.x * 64LL) {{"
    ));
    call.line("for (unsigned t = threadIdx.x; t < 256; t += blockDim.x) {");
    call.line("i64 row = row0 + t / 16, column = column0 + t % 16;");
    call.line(format!("if (blockDim.x == 1 && (row >= {row_count} || column >= {column_count})) continue;"));
    call.line(format!("{wide} sums[4][4] = {{}};"));
    call.line(format!("for (i64 k0 = 0; k0 < {depth}; k0 += 16) {{"));
    call.line("__syncthreads();");
    for side in [LEFT, RIGHT] {
        let (tile, first, limit, outer) = match side {
            LEFT => ("left_tile", "row0", &row_count, &groups.rows),
            _ => ("right_tile", "column0", &column_count, &groups.columns),
        };
        call.line("for (unsigned e = threadIdx.x; e < 1024; e += blockDim.x) {");
        // Neighbouring threads read neighbouring elements.
        let along_depth = groups.depth.strides.get(side).and_then(|s| s.last()).is_some_and(Dim::is_one);
        call.line(if along_depth {
            "unsigned p = e / 16, q = e % 16;"
        } else {
            "unsigned p = e % 64, q = e / 64;"
        });
        call.line(format!("i64 o = {first} + p, k = k0 + q;"));
        call.line(format!("{wide} x = 0;"));
        call.line(format!("if (o < {limit} && k < {depth}) {{"));
        let (outer_places, depth_places) = (call.places(outer, "o"), call.places(&groups.depth, "k"));
        let element = match side {
            LEFT => {
                let from = at("left_batch", &[place(&outer_places, LEFT), place(&depth_places, LEFT)]);
                load(*dtype, "left", &from)
            }
            _ => task.right_element(&mut call, &outer_places, &depth_places, ["o", "k"]),
        };
        call.line(format!("x = {element};"));
        call.line("}");
        call.line(format!("{tile}[q * 65 + p] = x;"));
        call.line("}");
    }
    call.lines(
        "__syncthreads();
        UNROLL
        for (int q = 0; q < 16; q++) {
        UNROLL
        for (int m = 0; m < 4; m++) {
        UNROLL
        for (int n = 0; n < 4; n++) {
        sums[m][n] += left_tile[q * 65 + t / 16 + 16 * m] * right_tile[q * 65 + t % 16 + 16 * n];
        }
        }
        }
        }",
    );
    call.lines("UNROLL\nfor (int m = 0; m < 4; m++) {\nUNROLL\nfor (int n = 0; n < 4; n++) {");
    call.line("i64 r = row + 16 * m, c = column + 16 * n;");
    call.line(format!("if (r < {row_count} && c < {column_count}) {{"));
    let (row_places, column_places) = (call.places(&groups.rows, "r"), call.places(&groups.columns, "c"));
    let to = at("y_batch", &[place(&row_places, RESULT), place(&column_places, RESULT)]);
    call.line(store("y", &to, "sums[m][n]"));
    call.lines("}\n}\n}\n}\n}\n}\n}");
    let tiles = |count: &Dim| count.ceil_div(&Dim::constant(TILE));
    let most = Dim::constant(65535);
    let blocks = [tiles(&columns) * when, tiles(&rows).minimum(&most), batches.minimum(&most)];
    call.finish(emitter.kernels, &format!("product_{}", task.suffix()), THREADS, blocks, 0)
}
