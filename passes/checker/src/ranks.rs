//! Whether the graphs that ranks execute are what the program says, and whether they fit together.
//!
//! Types and attributes are derived here again from layouts, not taken from the code that made the graphs.

use crate::finding::{Finding, Report};
use crate::holding::{Part, Region, coordinates, region};
use crate::symbols::{assignments, mix};
use crate::weights::{source, unflat};
use tpshard_ir::op::{Literal, TableWindow};
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Bindings, Conversion, Dim, Graph, Mesh, Op, Spmd, Step, StepId, StepKind, Type};

/// Compares the graph of every rank with the program.
///
/// # Errors
/// Everything that differs.
pub fn check_ranks(program: &Spmd, locals: &[Graph]) -> Result<Report, Vec<Finding>> {
    let mut findings = Vec::new();
    if locals.len() != program.mesh.ranks() {
        let what = format!("{} rank graphs for a mesh of {}", locals.len(), program.mesh);
        return Err(vec![Finding::Program { what }]);
    }
    let points = assignments(&program.logical, 3);
    for (rank, local) in locals.iter().enumerate() {
        if local.len() != program.steps.len() {
            let what =
                format!("rank {rank} has {} nodes, the program {} steps", local.len(), program.steps.len());
            findings.push(Finding::Program { what });
            continue;
        }
        for (i, step) in program.steps.iter().enumerate() {
            if let Err(what) = check_node(program, step, i, rank, local, &points) {
                findings.push(rank_finding(rank, i, local, what));
            }
        }
        let same = local.outputs.len() == program.outputs.len()
            && local
                .outputs
                .iter()
                .zip(&program.outputs)
                .all(|(a, b)| a.name == b.name && a.value.0 == b.step.0);
        if !same {
            findings
                .push(Finding::Program { what: format!("rank {rank} has other outputs than the program") });
        }
    }
    let collectives = check_collectives(&program.mesh, locals, &points, &mut findings);
    if findings.is_empty() {
        Ok(Report { ranks: locals.len(), collectives, ..Report::default() })
    } else {
        Err(findings)
    }
}

fn rank_finding(rank: usize, at: usize, local: &Graph, what: String) -> Finding {
    let op = local.nodes().get(at).map_or_else(|| "nothing".into(), |n| n.op.name().to_string());
    Finding::Rank { rank, step: StepId(u32::try_from(at).unwrap_or(u32::MAX)), op, what }
}

fn check_node(
    program: &Spmd,
    step: &Step,
    at: usize,
    rank: usize,
    local: &Graph,
    points: &[Bindings],
) -> Result<(), String> {
    let found = &local.nodes()[at];
    let logical = program.logical.nodes().get(step.value.index()).ok_or("the step makes no value")?;
    let made = held(program, step, rank)?;
    let ty = Type::new(logical.ty.dtype, made.iter().map(|p| p.length.clone()).collect());
    if found.ty != ty {
        return Err(format!("has type {}, the layout {} gives {ty}", found.ty, step.layout));
    }
    if found.args.iter().map(|a| a.0).ne(step.args.iter().map(|a| a.0)) {
        return Err("has other operands than the step".into());
    }
    if let StepKind::Convert(conversion) = &step.kind {
        return match &found.op {
            Op::Convert(own) if own == conversion => Ok(()),
            other => Err(format!("is {}, the program says {}", other.name(), conversion.name())),
        };
    }
    let operands = step
        .args
        .iter()
        .map(|a| held(program, program.steps.get(a.index()).ok_or("an operand is missing")?, rank))
        .collect::<Result<Vec<Region>, String>>()?;
    same_operation(&logical.op, &found.op, &made, &operands, &logical_types(program, logical)?, points)
}

fn logical_types<'a>(program: &'a Spmd, node: &tpshard_ir::Node) -> Result<Vec<&'a Type>, String> {
    let ty = |arg: &tpshard_ir::ValueId| program.logical.nodes().get(arg.index()).map(|node| &node.ty);
    node.args.iter().map(|arg| ty(arg).ok_or_else(|| format!("operand {arg} does not exist"))).collect()
}

fn held(program: &Spmd, step: &Step, rank: usize) -> Result<Region, String> {
    let node = program.logical.nodes().get(step.value.index()).ok_or("a step makes no value")?;
    region(&node.ty.shape, &step.layout, &program.mesh, rank)
        .ok_or_else(|| format!("the layout {} does not fit {}", step.layout, node.ty))
}

/// True if the dims agree, as polynomials or at every point.
fn same_dim(a: &Dim, b: &Dim, points: &[Bindings]) -> bool {
    a == b || (!points.is_empty() && points.iter().all(|p| a.eval(p).is_ok_and(|v| b.eval(p) == Ok(v))))
}

/// Checks that `local` is `logical` with the attributes that hold for what is made and held.
fn same_operation(
    logical: &Op,
    local: &Op,
    made: &Region,
    operands: &[Region],
    types: &[&Type],
    points: &[Bindings],
) -> Result<(), String> {
    let lengths = || made.iter().map(|p| &p.length);
    let differs = |what: &str| Err(format!("{what} differs from what the layout gives"));
    match (logical, local) {
        (Op::Weight(whole), Op::Weight(part)) => same_weight(whole, part, made),
        (Op::Literal(whole), Op::Literal(part)) => same_literal(whole, part, made),
        (Op::Iota { start, .. }, Op::Iota { start: own, length }) => {
            let part = made.first().ok_or("iota of rank 0")?;
            if !same_dim(own, &(start + &part.start), points) || *length != part.length {
                return differs("the run of numbers");
            }
            Ok(())
        }
        (Op::Broadcast { .. }, Op::Broadcast { shape }) | (Op::Reshape { .. }, Op::Reshape { shape }) => {
            if lengths().ne(shape) {
                differs("the shape")
            } else {
                Ok(())
            }
        }
        (Op::Gather { axis, window: None }, Op::Gather { axis: own, window }) => {
            let table = operands.first().and_then(|r| r.get(*axis)).ok_or("gather without table")?;
            let extent = types.first().and_then(|ty| ty.shape.get(*axis)).ok_or("gather without table")?;
            let right = match window {
                None => table.is_whole(extent),
                Some(TableWindow { start, extent: all }) => {
                    !table.is_whole(extent) && same_dim(start, &table.start, points) && all == extent
                }
            };
            if axis != own || !right { differs("the window of the table") } else { Ok(()) }
        }
        (
            Op::Attention { scale, softcap, kv_of_head, empty_rows_zero },
            Op::Attention { scale: own, softcap: cap, kv_of_head: map, empty_rows_zero: zero },
        ) => {
            if (scale, softcap, empty_rows_zero) != (own, cap, zero) {
                return differs("an attribute");
            }
            let heads = made.get(1).and_then(Part::constant).ok_or("heads are symbolic")?;
            let keys = operands
                .get(1)
                .and_then(|r| r.get(1))
                .and_then(Part::constant)
                .ok_or("heads are symbolic")?;
            let right = map.len() == heads.1
                && map.iter().enumerate().all(|(i, &kv)| {
                    (kv as usize) < keys.1
                        && kv_of_head
                            .get(heads.0 + i)
                            .is_some_and(|&global| global as usize == keys.0 + kv as usize)
                });
            if right { Ok(()) } else { differs("the map from heads to KV heads") }
        }
        (Op::Conv { window, groups }, Op::Conv { window: own, groups: local_groups }) => {
            let channels = made.get(1).and_then(Part::constant).ok_or("channels are symbolic")?;
            let all =
                types.get(1).and_then(|w| w.shape.first()).and_then(Dim::as_size).ok_or("no channels")?;
            // Channels per group stay what they were, unless all are of one group; a rank without channels has no groups
            // to count.
            let group = |channel: usize| channel.checked_mul(*groups)?.checked_div(all);
            let right = if *groups == 1 {
                *local_groups == 1
            } else {
                let last = (channels.0 + channels.1).checked_sub(1);
                channels.1 == 0
                    || local_groups.checked_mul(all) == groups.checked_mul(channels.1)
                    || (*local_groups == 1 && group(channels.0) == last.and_then(group))
            };
            if window != own || !right { differs("the number of groups") } else { Ok(()) }
        }
        (logical, local) if logical == local => Ok(()),
        _ => Err(format!("is {}, not the local form of {}", local.name(), logical.name())),
    }
}

fn constants(made: &Region) -> Result<(Vec<usize>, Vec<usize>), String> {
    let runs: Option<Vec<(usize, usize)>> = made.iter().map(Part::constant).collect();
    Ok(runs.ok_or("a part of a constant is symbolic")?.into_iter().unzip())
}

/// How many elements of a weight are traced to their source: all corners of small ones, a sample of large ones.
const TRACED: u64 = 256;

/// The part has the right shape, and its corners and a sample come from the right elements. Slices, joins and
/// transposes that agree there and nowhere else cannot be written with fewer operations than elements traced.
fn same_weight(whole: &WeightExpr, part: &WeightExpr, made: &Region) -> Result<(), String> {
    let (starts, lengths) = constants(made)?;
    if part.shape() != lengths || part.dtype() != whole.dtype() {
        return Err("the slice of the weight has another shape than the layout gives".into());
    }
    let count: usize = lengths.iter().product();
    let check = |position: usize| {
        let index = unflat(position, &lengths);
        let global: Vec<usize> = index.iter().zip(&starts).map(|(i, start)| i + start).collect();
        let (expected, found) = (source(whole, &global), source(part, &index));
        if expected.is_some() && expected == found {
            return Ok(());
        }
        Err(format!("element {index:?} of the weight's slice is not element {global:?} of the weight"))
    };
    if count as u64 <= TRACED {
        return (0..count).try_for_each(check);
    }
    check(0)?;
    check(count - 1)?;
    (0..TRACED).try_for_each(|i| check((mix(i) % count as u64) as usize))
}

fn same_literal(whole: &Literal, part: &Literal, made: &Region) -> Result<(), String> {
    let (starts, lengths) = constants(made)?;
    let (whole, part) = (&whole.0, &part.0);
    if part.shape() != lengths || part.dtype() != whole.dtype() {
        return Err("the slice of the literal has another shape than the layout gives".into());
    }
    if whole == part && starts.iter().all(|&s| s == 0) {
        return Ok(());
    }
    let width = whole.dtype().bits() / 8;
    if width == 0 {
        return Err("a packed literal is cut".into());
    }
    let (all, own) = (whole.data().to_le_bytes(), part.data().to_le_bytes());
    for (position, element) in own.chunks(width).enumerate() {
        let index: Vec<usize> = unflat(position, &lengths).iter().zip(&starts).map(|(i, s)| i + s).collect();
        let at = crate::weights::flat(&index, whole.shape()) * width;
        if all.get(at..at + width) != Some(element) {
            return Err(format!(
                "element {position} of the literal's slice is not element {index:?} of the literal"
            ));
        }
    }
    Ok(())
}

/// All ranks issue the same collectives in the same order, and within each group sizes match. Returns how many.
fn check_collectives(
    mesh: &Mesh,
    locals: &[Graph],
    points: &[Bindings],
    findings: &mut Vec<Finding>,
) -> usize {
    let issued: Vec<Vec<(usize, &Conversion)>> = locals.iter().map(issues).collect();
    let Some(first) = issued.first() else { return 0 };
    for (rank, own) in issued.iter().enumerate().skip(1) {
        let apart = (0..own.len().max(first.len())).find(|&i| own.get(i) != first.get(i));
        if let Some(i) = apart {
            let name = |list: &[(usize, &Conversion)]| {
                list.get(i).map_or_else(|| "nothing".into(), |(at, c)| format!("{} in ${at}", c.name()))
            };
            let at = own.get(i).or(first.get(i)).map_or(0, |(at, _)| *at);
            let what = format!("issues {} where rank 0 issues {}", name(own), name(first));
            findings.push(rank_finding(rank, at, &locals[rank], what));
            return first.len();
        }
    }
    for &(at, conversion) in first {
        for rank in 0..locals.len() {
            let group = members(mesh, rank, conversion.axes());
            if group.first() != Some(&rank) {
                continue;
            }
            if let Err(what) = check_sizes(conversion, at, &group, locals, points) {
                findings.push(rank_finding(rank, at, &locals[rank], what));
            }
        }
    }
    first.len()
}

fn issues(local: &Graph) -> Vec<(usize, &Conversion)> {
    local
        .nodes()
        .iter()
        .enumerate()
        .filter_map(|(i, node)| match &node.op {
            Op::Convert(conversion) if conversion.communicates() => Some((i, conversion)),
            _ => None,
        })
        .collect()
}

/// The ranks whose coordinates agree with those of `rank` off `axes`, ascending.
fn members(mesh: &Mesh, rank: usize, axes: &[usize]) -> Vec<usize> {
    let own = coordinates(mesh, rank);
    let alike = |other: &usize| {
        coordinates(mesh, *other)
            .iter()
            .zip(&own)
            .enumerate()
            .all(|(axis, (a, b))| a == b || axes.contains(&axis))
    };
    (0..mesh.ranks()).filter(alike).collect()
}

/// What goes in over the group is what comes out.
fn check_sizes(
    conversion: &Conversion,
    at: usize,
    group: &[usize],
    locals: &[Graph],
    points: &[Bindings],
) -> Result<(), String> {
    let node = |rank: usize| &locals[rank].nodes()[at];
    let source = |rank: usize| {
        let arg = node(rank).args.first().ok_or("a conversion without operand")?;
        locals[rank].nodes().get(arg.index()).map(|n| &n.ty).ok_or("an operand is missing")
    };
    let size = |ty: &Type, dim: usize, point: &Bindings| -> Result<i64, String> {
        let extent = ty.shape.get(dim).ok_or_else(|| format!("{ty} has no dim {dim}"))?;
        extent.eval(point).map_err(|e| e.to_string())
    };
    let before = group.iter().map(|&r| source(r)).collect::<Result<Vec<&Type>, &str>>()?;
    let after: Vec<&Type> = group.iter().map(|&r| &node(r).ty).collect();
    let total = |types: &[&Type], dim, point: &Bindings| {
        types.iter().try_fold(0i64, |sum, ty| {
            sum.checked_add(size(ty, dim, point)?).ok_or_else(|| "the sizes of the parts overflow".to_owned())
        })
    };
    let agree = |types: &[&Type]| types.windows(2).all(|w| w[0] == w[1]);
    if points.is_empty() {
        return Err("no small values for the dims keep all guards, so sizes cannot be compared".into());
    }
    for point in points {
        // (dim dealt out before, dim dealt out after)
        let (from, to) = match conversion {
            Conversion::AllReduce { .. } => (None, None),
            Conversion::AllGather { dim, .. } => (Some(*dim), None),
            Conversion::ReduceScatter { dim, .. } => (None, Some(*dim)),
            Conversion::AllToAll { from, to, .. } => (Some(*from), Some(*to)),
            Conversion::Redeal { dim, .. } => (Some(*dim), Some(*dim)),
            Conversion::ShardSlice { .. }
            | Conversion::OnlyFirst { .. }
            | Conversion::Transfer
            | Conversion::TreeReduce { .. } => return Ok(()),
        };
        if (from.is_none() && !agree(&before)) || (to.is_none() && !agree(&after)) {
            return Err("ranks of one group bring tensors of different shapes".into());
        }
        for dim in [from, to].into_iter().flatten() {
            let sum = |types: &[&Type], dealt: bool| {
                if dealt { total(types, dim, point) } else { size(types[0], dim, point) }
            };
            let (sent, received) = (sum(&before, from == Some(dim))?, sum(&after, to == Some(dim))?);
            if sent != received {
                return Err(format!("the group sends {sent} entries of dim {dim} and receives {received}"));
            }
        }
    }
    Ok(())
}
