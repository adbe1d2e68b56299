//! Every conversion the table offers between two layouts is executed on random families, uneven and empty parts
//! included, and accepted by the checker, which has a table of its own.

mod instances;

use instances::{bindings, ty};
use std::collections::BTreeMap;
use tpshard_checker::{Finding, check, check_ranks};
use tpshard_ir::interp::{Array, Field, Interpreter, OpError, decode, random_array, random_family};
use tpshard_ir::spmd::instantiate;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{
    AxisLayout, Conversion, Dim, Graph, Layout, Mesh, Monoid, Spmd, SpmdOutput, Step, StepId, StepKind, Type,
    ValueId,
};
use tpshard_passes::sharding::{conversions, is_well_formed};

fn layouts(ty: &Type, mesh: &Mesh) -> Vec<Layout> {
    let mut one = vec![AxisLayout::Replicated];
    one.extend([Monoid::Sum, Monoid::Max].map(AxisLayout::Partial));
    for dim in 0..ty.rank() {
        one.extend([1usize, 2, 3].map(|unit| AxisLayout::shard(dim, unit)));
    }
    let mut all = vec![Layout(vec![])];
    for _ in 0..mesh.axes() {
        all = all
            .iter()
            .flat_map(|l| one.iter().map(|a| Layout(l.0.iter().chain([a]).cloned().collect())))
            .collect();
    }
    all.into_iter().filter(|l| is_well_formed(ty, l, mesh)).collect()
}

fn program(ty: &Type, mesh: &Mesh, from: &Layout, to: &Layout, conversion: &Conversion) -> Spmd {
    let mut logical = Graph::new("conversion");
    let value = logical.input("x", ty.clone());
    let convert = StepKind::Convert(conversion.clone());
    let steps = vec![
        Step { value, layout: from.clone(), kind: StepKind::Compute, args: vec![] },
        Step { value, layout: to.clone(), kind: convert, args: vec![StepId(0)] },
    ];
    Spmd {
        mesh: mesh.clone(),
        imported: logical.len(),
        logical,
        equations: vec![],
        steps,
        outputs: vec![SpmdOutput { name: "x".into(), step: StepId(1) }],
    }
}

fn execute(ty: &Type, program: &Spmd, locals: &[Graph]) -> Result<(), String> {
    let (from, to, mesh) = (&program.steps[0].layout, &program.steps[1].layout, &program.mesh);
    let shape: Vec<usize> = ty.shape.iter().map(|d| d.eval(&bindings()).unwrap() as usize).collect();
    let logical = random_array(&Field, ty.dtype, &shape, 3).unwrap();
    let text = |e: OpError| e.to_string();
    let family = random_family(&Field, &logical, from, mesh, &bindings(), 11).map_err(text)?;
    let weights = |_: &WeightExpr| -> Result<Array<u64>, OpError> { Err(OpError::TooLarge) };
    let interpreter =
        Interpreter { domain: &Field, weights: &weights, element_limit: 1 << 20, deferred: None };
    let lookup = |rank: usize, _: ValueId, _: &str| family.get(rank).cloned();
    let outputs = interpreter.run_ranks(locals, mesh, &bindings(), &lookup).map_err(|e| e.to_string())?;
    let made: Vec<Array<u64>> = outputs.into_iter().filter_map(|mut o| o.pop()).map(|(_, a)| a).collect();
    let found = decode(&Field, &made, to, mesh).map_err(text)?;
    if found == logical { Ok(()) } else { Err("the value changes".into()) }
}

#[test]
fn every_conversion_keeps_the_value() {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for text in ["f32[6, 5]", "f32[s, 4]", "i64[9]"] {
        let ty = ty(text);
        for mesh in [vec![2], vec![3], vec![4], vec![2, 2], vec![2, 3]].map(Mesh) {
            let all = layouts(&ty, &mesh);
            for (from, to) in all.iter().flat_map(|a| all.iter().map(move |b| (a, b))) {
                let Some(conversion) = conversions(&ty, from, to, &mesh) else { continue };
                *counts.entry(conversion.name()).or_default() += 1;
                let program = program(&ty, &mesh, from, to, &conversion);
                let locals: Vec<Graph> =
                    (0..mesh.ranks()).map(|rank| instantiate(&program, rank).unwrap()).collect();
                let refused = check(&program, &program.logical).err().unwrap_or_default();
                let refused = refused.iter().find(|f| matches!(f, Finding::Step { step: StepId(1), .. }));
                let on_ranks = check_ranks(&program, &locals).err();
                let executed = execute(&ty, &program, &locals);
                if let Some(what) =
                    refused.map(|f| f.to_string()).or(on_ranks.map(|f| f[0].to_string())).or(executed.err())
                {
                    wrong.push(format!("{ty} on {mesh}: {from} to {to} by {}: {what}", conversion.name()));
                }
            }
        }
    }
    println!("{counts:?}");
    assert_eq!(counts.len(), 7, "{counts:?}");
    assert!(wrong.is_empty(), "{} conversions fail:\n{}", wrong.len(), wrong.join("\n"));
}

/// Where the table offers nothing, the conversions one might try are refused by the checker too.
#[test]
fn what_is_not_offered_is_not_legal() {
    let ty = ty("f32[4, 6]");
    let mesh = Mesh(vec![2, 2]);
    let all = layouts(&ty, &mesh);
    let mut refused = 0;
    for (from, to) in all.iter().flat_map(|a| all.iter().map(move |b| (a, b))) {
        if conversions(&ty, from, to, &mesh).is_some() {
            continue;
        }
        for axes in [vec![0], vec![1], vec![0, 1]] {
            for conversion in attempts(from, to, axes) {
                let program = program(&ty, &mesh, from, to, &conversion);
                let found = check(&program, &program.logical).err().unwrap_or_default();
                let named = found.iter().any(|f| matches!(f, Finding::Step { step: StepId(1), .. }));
                assert!(named, "{from} to {to} by {conversion:?}");
                refused += 1;
            }
        }
    }
    assert!(refused > 1000, "{refused}");
}

/// Conversions whose attributes fit what the first of `axes` does.
fn attempts(from: &Layout, to: &Layout, axes: Vec<usize>) -> Vec<Conversion> {
    use AxisLayout::{Partial, Replicated, Shard};
    let mut all = Vec::new();
    let one = Dim::constant(1);
    match (from.0[axes[0]].clone(), to.0[axes[0]].clone()) {
        (Replicated, Shard { dim, unit }) => all.push(Conversion::ShardSlice { axes, dim, unit }),
        (Shard { dim, unit }, Replicated) => all.push(Conversion::AllGather { axes, dim, unit }),
        (Replicated, Partial(monoid)) => all.push(Conversion::OnlyFirst { axes, monoid }),
        (Partial(monoid), Replicated) => all.push(Conversion::AllReduce { axes, monoid }),
        (Partial(monoid), Shard { dim, unit }) => {
            all.push(Conversion::ReduceScatter { axes, monoid, dim, unit });
        }
        (Shard { dim, unit }, Shard { dim: to, unit: to_unit }) => {
            let (from_unit, to_unit) = (unit, to_unit);
            all.push(Conversion::AllToAll {
                axes: axes.clone(),
                from: dim,
                from_unit: from_unit.clone(),
                to,
                to_unit: to_unit.clone(),
            });
            all.push(Conversion::Redeal { axes, dim, from_unit, to_unit });
        }
        (Shard { dim, .. }, Partial(_)) => all.push(Conversion::AllGather { axes, dim, unit: one }),
        (Partial(monoid), Partial(_)) => all.push(Conversion::AllReduce { axes, monoid }),
        (Replicated, Replicated) => all.push(Conversion::Transfer),
    }
    all
}
