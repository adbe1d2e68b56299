//! Contractions as batched matrix products.
//!
//! The letters of an einsum fall into four groups: in both operands and the result (batch), in the first and the result
//! (rows), in the second and the result (columns), in both operands only (depth). Where each group is walked with one
//! stride in all that hold it, a library can do the product; our own kernels take groups of any number of dims. Results
//! of few rows are summed by a warp for each column, others in tiles that pass through shared memory.

use super::emit::{Emitter, Made, Operand};
use super::space::Offsets;
use super::text::{Call, load, store, wide_type};
use super::views::dense;
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::program::device::{Launch, Matrix, Product};
use tpshard_ir::{DType, Dim, Node, ValueId};

/// Rows and columns of a tile.
const TILE: i64 = 64;
/// Most rows that a warp sums for a column.
const FEW: i64 = 4;
const THREADS: u32 = 256;

/// The groups of letters: strides in the left operand, the right one and the result; 0 where a group is absent.
struct Groups {
    batch: Offsets,
    rows: Offsets,
    columns: Offsets,
    depth: Offsets,
}

impl Groups {
    fn new(
        emitter: &Emitter<'_>,
        node: &Node,
        spec: &EinsumSpec,
        left: &Operand,
        right: &Operand,
    ) -> Option<Groups> {
        let [a, b] = spec.inputs.as_slice() else { return None };
        let out = &spec.output;
        let out_strides = dense(&node.ty.shape);
        let stride = |letters: &[u8], strides: &[Dim], letter: u8| {
            letters.iter().position(|&l| l == letter).and_then(|at| strides.get(at).cloned())
        };
        let extent = |letter: u8| -> Option<Dim> {
            let of = |letters: &[u8], value: ValueId| {
                letters
                    .iter()
                    .position(|&l| l == letter)
                    .and_then(|at| emitter.ty(value).shape.get(at).cloned())
            };
            of(a, *node.args.first()?).or_else(|| of(b, *node.args.get(1)?))
        };
        let group = |letters: Vec<u8>| -> Option<Offsets> {
            let extents = letters.iter().map(|&l| extent(l)).collect::<Option<Vec<Dim>>>()?;
            let over = |own: &[u8], strides: &[Dim]| -> Vec<Dim> {
                letters.iter().map(|&l| stride(own, strides, l).unwrap_or_else(|| Dim::constant(0))).collect()
            };
            let strides =
                [over(a, &left.view.strides), over(b, &right.view.strides), over(out, &out_strides)];
            Some(Offsets::new(&extents, &strides.each_ref().map(Vec::as_slice)))
        };
        let pick = |test: &dyn Fn(u8) -> bool, of: &[u8]| -> Vec<u8> {
            of.iter().copied().filter(|&l| test(l)).collect()
        };
        Some(Groups {
            batch: group(pick(&|l| a.contains(&l) && b.contains(&l), out))?,
            rows: group(pick(&|l| !b.contains(&l), out))?,
            columns: group(pick(&|l| !a.contains(&l), out))?,
            depth: group(pick(&|l| b.contains(&l) && !out.contains(&l), a))?,
        })
    }

    /// What a library takes: every group one dim, and in every matrix one of its two dims dense.
    fn matrices(&self, left: &Operand, right: &Operand, value: ValueId) -> Option<[Matrix; 3]> {
        let of = |group: &Offsets, operand: usize| group.line().and_then(|line| line.get(operand).cloned());
        let matrix = |operand: usize, base: ValueId, offset: &Dim, row: &Offsets, column: &Offsets| {
            let (row, column) = (of(row, operand)?, of(column, operand)?);
            let fits = row.is_one() || column.is_one();
            let batch = of(&self.batch, operand)?;
            fits.then(|| Matrix { value: base, offset: offset.clone(), batch, row, column })
        };
        Some([
            matrix(0, left.view.base, &left.view.offset, &self.rows, &self.depth)?,
            matrix(1, right.view.base, &right.view.offset, &self.depth, &self.columns)?,
            matrix(2, value, &Dim::constant(0), &self.rows, &self.columns)?,
        ])
    }
}

pub(super) fn einsum(emitter: &mut Emitter<'_>, value: ValueId, node: &Node, spec: &EinsumSpec) -> Made {
    let &[a, b] = node.args.as_slice() else { return Made::Not };
    let (left, right) = (emitter.operand(a), emitter.operand(b));
    let dtype = node.ty.dtype;
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
        return Made::Not;
    }
    let Some(groups) = Groups::new(emitter, node, spec, &left, &right) else { return Made::Not };
    let mut fallback = Vec::new();
    let few = groups.rows.count();
    match few.as_const() {
        Some(rows) if rows <= FEW => fallback.push(narrow(emitter, value, &left, &right, &groups, None)),
        Some(_) => fallback.push(tiled(emitter, value, &left, &right, &groups, None)),
        None => {
            // 1 where there are few rows, else 0: the other call has no block then.
            let is_few =
                (Dim::constant(FEW + 1) - &few).maximum(&Dim::constant(0)).minimum(&Dim::constant(1));
            fallback.push(narrow(emitter, value, &left, &right, &groups, Some(&is_few)));
            let is_many = Dim::constant(1) - is_few;
            fallback.push(tiled(emitter, value, &left, &right, &groups, Some(&is_many)));
        }
    }
    let Some([left, right, result]) = groups.matrices(&left, &right, value) else {
        return Made::Calls(fallback);
    };
    Made::Product(Box::new(Product {
        batch: groups.batch.count(),
        rows: groups.rows.count(),
        columns: groups.columns.count(),
        depth: groups.depth.count(),
        left,
        right,
        result,
        dtype,
        fallback,
    }))
}

/// The arrays and the place of a batch in each of them.
struct Start {
    left: String,
    right: String,
    out: String,
    batches: Dim,
}

fn start(
    call: &mut Call,
    value: ValueId,
    dtype: DType,
    left: &Operand,
    right: &Operand,
    groups: &Groups,
) -> Start {
    let left = call.read("left", dtype, left.view.base, &left.view.offset);
    let right = call.read("right", dtype, right.view.base, &right.view.offset);
    let out = call.write("y", dtype, value, &Dim::constant(0));
    Start { left, right, out, batches: groups.batch.count() }
}

/// Declares the places of all three at a batch.
fn batch_places(call: &mut Call, groups: &Groups, index: &str) {
    let places = call.places(&groups.batch, index);
    for (name, place) in ["left_batch", "right_batch", "y_batch"].iter().zip(places) {
        call.line(format!("i64 {name} = {place};"));
    }
}

fn at(base: &str, parts: &[&str]) -> String {
    let parts: Vec<&str> = parts.iter().copied().filter(|&part| part != "0").collect();
    if parts.is_empty() { base.into() } else { format!("{base} + {}", parts.join(" + ")) }
}

fn place(places: &[String], operand: usize) -> &str {
    places.get(operand).map_or("0", String::as_str)
}

/// A warp for each column, which walks the depth; all rows of a column are summed in one pass.
fn narrow(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    left: &Operand,
    right: &Operand,
    groups: &Groups,
    when: Option<&Dim>,
) -> Launch {
    let dtype = emitter.ty(value).dtype;
    let wide = wide_type(dtype);
    let mut call = Call::new();
    let Start { left, right, out, batches } = start(&mut call, value, dtype, left, right, groups);
    let (columns, depth) = (call.variable(&groups.columns.count()), call.variable(&groups.depth.count()));
    let rows = call.variable(&groups.rows.count());
    call.lines(
        "unsigned lanes = blockDim.x < 32 ? 1 : 32;
        unsigned lane = threadIdx.x % lanes, warps = blockDim.x / lanes;",
    );
    let batch_count = call.variable(&batches);
    call.line(format!("for (i64 batch = blockIdx.y; batch < {batch_count}; batch += gridDim.y) {{"));
    batch_places(&mut call, groups, "batch");
    // The loop's bounds are the same for all lanes of a warp.
    call.line(format!(
        "for (i64 column = blockIdx.x * (i64)warps + threadIdx.x / lanes; column < {columns}; \
         column += gridDim.x * (i64)warps) {{"
    ));
    let column_places = call.places(&groups.columns, "column");
    call.line(format!("for (i64 first = 0; first < {rows}; first += {FEW}) {{"));
    call.line(format!("{wide} sums[{FEW}] = {{}};"));
    call.line(format!("for (i64 k = lane; k < {depth}; k += lanes) {{"));
    let depth_places = call.places(&groups.depth, "k");
    let right_place = at("right_batch", &[place(&column_places, 1), place(&depth_places, 1)]);
    call.line(format!("{wide} w = {};", load(dtype, &right, &right_place)));
    call.line("UNROLL");
    call.line(format!("for (int m = 0; m < {FEW}; m++) {{"));
    call.line(format!("if (first + m < {rows}) {{"));
    call.line("i64 r = first + m;");
    let row_places = call.places(&groups.rows, "r");
    let left_place = at("left_batch", &[place(&row_places, 0), place(&depth_places, 0)]);
    call.line(format!("sums[m] += {} * w;", load(dtype, &left, &left_place)));
    call.lines("}\n}\n}");
    call.line("UNROLL");
    call.line(format!("for (int m = 0; m < {FEW}; m++) {{"));
    call.line(format!("{wide} sum = warp_reduce(sums[m], Add());"));
    call.line(format!("if (lane == 0 && first + m < {rows}) {{"));
    call.line("i64 r = first + m;");
    let row_places = call.places(&groups.rows, "r");
    let out_place = at("y_batch", &[place(&row_places, 2), place(&column_places, 2)]);
    call.line(store(&out, &out_place, "sum"));
    call.lines("}\n}\n}\n}\n}");
    let per_block = Dim::constant(i64::from(THREADS / 32));
    let mut blocks = groups.columns.count().ceil_div(&per_block);
    if let Some(when) = when {
        blocks = blocks * when;
    }
    let batches = batches.minimum(&Dim::constant(65535));
    call.finish(
        emitter.kernels,
        &format!("product_narrow_{dtype}"),
        THREADS,
        [blocks, batches, Dim::constant(1)],
        0,
    )
}

/// Tiles of 64 rows and columns, in steps of 16 along the depth; a thread holds 4 by 4 results.
///
/// A block of fewer threads takes the places of 256 in turn, so the depth is walked again for each.
fn tiled(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    left: &Operand,
    right: &Operand,
    groups: &Groups,
    when: Option<&Dim>,
) -> Launch {
    let dtype = emitter.ty(value).dtype;
    let wide = wide_type(dtype);
    let mut call = Call::new();
    let Start { left, right, out, batches } = start(&mut call, value, dtype, left, right, groups);
    let (rows, columns) = (groups.rows.count(), groups.columns.count());
    let (row_count, column_count) = (call.variable(&rows), call.variable(&columns));
    let depth = call.variable(&groups.depth.count());
    call.line(format!("SHARED({wide}, left_tile, 16 * 65);"));
    call.line(format!("SHARED({wide}, right_tile, 16 * 65);"));
    let batch_count = call.variable(&batches);
    call.line(format!("for (i64 batch = blockIdx.z; batch < {batch_count}; batch += gridDim.z) {{"));
    batch_places(&mut call, groups, "batch");
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
    for (side, outer, array) in [(0, &groups.rows, &left), (1, &groups.columns, &right)] {
        let (tile, first, limit, base) = match side {
            0 => ("left_tile", "row0", &row_count, "left_batch"),
            _ => ("right_tile", "column0", &column_count, "right_batch"),
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
        let from = at(base, &[place(&outer_places, side), place(&depth_places, side)]);
        call.line(format!("x = {};", load(dtype, array, &from)));
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
    let to = at("y_batch", &[place(&row_places, 2), place(&column_places, 2)]);
    call.line(store(&out, &to, "sums[m][n]"));
    call.lines("}\n}\n}\n}\n}\n}\n}");
    let tiles = |count: &Dim| count.ceil_div(&Dim::constant(TILE));
    let mut across = tiles(&columns);
    if let Some(when) = when {
        across = across * when;
    }
    let most = Dim::constant(65535);
    let blocks = [across, tiles(&rows).minimum(&most), batches.minimum(&most)];
    call.finish(emitter.kernels, &format!("product_{dtype}"), THREADS, blocks, 0)
}
