//! The checker's table against the planner's, and against execution: what the planner generates the checker accepts, and
//! what the checker accepts holds. The two tables share no code, so a slip in either shows here.

mod instances;

use instances::Instance;
use instances::execute::{execute, meshes, program, square_text, squares_of};
use tpshard_checker::{Finding, check, check_ranks};
use tpshard_ir::spmd::instantiate;
use tpshard_ir::{AxisLayout, Layout, Mesh, Monoid, Spmd, Type};
use tpshard_passes::sharding::MeshSquare;

/// The square alone: a partial result is no output.
fn square_only(instance: &Instance, mesh: &Mesh, square: &MeshSquare) -> Spmd {
    let mut program = program(instance, mesh, square);
    program.outputs.clear();
    program
}

/// What the checker finds wrong with the last step. That inputs are never partial is not what is tested here.
fn verdict(program: &Spmd) -> Option<Finding> {
    let last = program.steps.len() as u32 - 1;
    let findings = check(program, &program.logical).err().unwrap_or_default();
    findings.into_iter().find(|f| !matches!(f, Finding::Step { step, .. } if step.0 < last))
}

#[test]
fn the_checker_accepts_every_generated_square() {
    let mut refused = Vec::new();
    let mut count = 0;
    for mesh in meshes() {
        for instance in instances::all() {
            for square in squares_of(&instance, &mesh) {
                let program = square_only(&instance, &mesh, &square);
                count += 1;
                let locals: Vec<_> =
                    (0..mesh.ranks()).map(|rank| instantiate(&program, rank).unwrap()).collect();
                let ranks = || check_ranks(&program, &locals).err().map(|findings| findings[0].clone());
                if let Some(finding) = verdict(&program).or_else(ranks) {
                    refused.push(format!("{} on {mesh}: {}: {finding}", instance.name, square_text(&square)));
                }
            }
        }
    }
    println!("{count} squares checked");
    assert!(refused.is_empty(), "{} of {count} refused:\n{}", refused.len(), refused.join("\n"));
}

/// Every layout of a value on one axis of two ranks, the odd ones included.
fn layouts(ty: &Type) -> Vec<AxisLayout> {
    let mut all = vec![AxisLayout::Replicated];
    all.extend([Monoid::Sum, Monoid::Max].map(AxisLayout::Partial));
    for (dim, extent) in ty.shape.iter().enumerate() {
        let units = [1usize, 2, 3].into_iter().filter(|&u| extent.exact_div(&u.into()).is_some());
        all.extend(units.map(|unit| AxisLayout::shard(dim, unit)));
    }
    all
}

/// All choices of one layout per operand and result, at most so many, evenly spread.
fn typings(instance: &Instance, most: usize) -> Vec<MeshSquare> {
    let choices: Vec<Vec<AxisLayout>> = instance.args.iter().chain([&instance.result]).map(layouts).collect();
    let total: usize = choices.iter().map(Vec::len).product();
    let step = total.div_ceil(most).max(1);
    // A step that shares no factor with the numbers of choices reaches all of them.
    let step = if step == 1 {
        1
    } else {
        (step..).find(|s| s % 2 != 0 && s % 3 != 0 && s % 5 != 0 && s % 7 != 0).unwrap()
    };
    (0..total)
        .step_by(step)
        .map(|mut number| {
            let mut picked: Vec<Layout> = choices
                .iter()
                .map(|list| {
                    let own = list[number % list.len()].clone();
                    number /= list.len();
                    Layout(vec![own])
                })
                .collect();
            let result = picked.pop().unwrap();
            MeshSquare { operands: picked, result }
        })
        .collect()
}

#[test]
fn what_the_checker_accepts_holds() {
    let (mut tried, mut accepted, mut wrong) = (0, 0, Vec::new());
    for ranks in [2, 3] {
        let mesh = Mesh::flat(ranks);
        for instance in instances::all() {
            for square in typings(&instance, 1500) {
                tried += 1;
                let program = square_only(&instance, &mesh, &square);
                if verdict(&program).is_some() {
                    continue;
                }
                accepted += 1;
                if let Err(what) = execute(&instance, &mesh, &square, 5) {
                    wrong.push(format!("{} on {mesh}: {}: {what}", instance.name, square_text(&square)));
                }
            }
        }
    }
    println!("{accepted} of {tried} typings accepted");
    assert!(accepted > 1000);
    assert!(wrong.is_empty(), "{} accepted typings do not hold:\n{}", wrong.len(), wrong.join("\n"));
}

/// On one axis the planner's table misses nothing that the checker accepts, but the splitting of dims that have one entry
/// or none.
#[test]
fn the_planner_knows_what_the_checker_accepts() {
    let mesh = Mesh::flat(2);
    let mut missing = std::collections::BTreeSet::new();
    for instance in instances::all() {
        let generated = squares_of(&instance, &mesh);
        for square in typings(&instance, 1500) {
            let canonical = |l: &Layout, ty: &Type| match &l.0[0] {
                AxisLayout::Shard { dim, unit } => Layout(vec![AxisLayout::Shard {
                    dim: *dim,
                    unit: tpshard_passes::sharding::canonical(&ty.shape[*dim], unit, 2),
                }]),
                _ => l.clone(),
            };
            let named = MeshSquare {
                operands: square
                    .operands
                    .iter()
                    .zip(&instance.args)
                    .map(|(l, ty)| canonical(l, ty))
                    .collect(),
                result: canonical(&square.result, &instance.result),
            };
            let program = square_only(&instance, &mesh, &named);
            if !generated.contains(&named) && verdict(&program).is_none() {
                missing.insert(format!("{}: {}", instance.name, square_text(&named)));
            }
        }
    }
    let missing: Vec<String> = missing.into_iter().collect();
    let expected = [
        "conv_depthwise: S(0), R -> S(0)",
        "reshape_empty: R -> S(0)",
        "reshape_empty: S(1) -> R",
        "reshape_empty: S(1) -> S(0)",
    ];
    assert_eq!(missing, expected);
}
