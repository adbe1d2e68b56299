//! What was measured, as a profile and as tables.

use super::fit::{Line, lines, ring};
use super::links::{Carrier, Point};
use super::models::{Compared, Model};
use super::{Measurements, ROUNDS};
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::output;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use tpshard_passes::cost::Profile;
use tpshard_passes::cost::kernels::{Family, print_rates};
use tpshard_passes::cost::profile::Collective;

/// Bytes of memory of this machine.
pub(crate) fn memory_of_machine() -> Outcome<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").or_fail(Kind::Resource)?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kilobytes = line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok());
    let bytes = kilobytes.map(|k| k * 1024.0).filter(|b| *b > 0.0);
    bytes.ok_or_else(|| Failure::new(Kind::Resource, "/proc/meminfo: no MemTotal"))
}

/// Bytes of the largest cache of the first core, if the machine says.
fn shared_cache() -> Option<f64> {
    let size = |index: usize| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = std::fs::read_to_string(path).ok()?;
        let text = text.trim();
        let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let unit = match unit {
            "" => 1.0,
            "K" => 1024.0,
            "M" => 1024.0 * 1024.0,
            _ => return None,
        };
        Some(number.parse::<f64>().ok()? * unit)
    };
    (0..8).filter_map(size).filter(|bytes| *bytes > 0.0).reduce(f64::max)
}

/// What is written, as it will be read.
pub(crate) fn profile(measured: &Measurements) -> Outcome<Profile> {
    Profile::parse(&profile_text(measured)).or_fail(Kind::Internal)
}

/// Writes the profile, and says what was measured.
pub(crate) fn finish(measured: &Measurements, out: Option<&Path>, json: bool) -> Outcome<()> {
    let text = profile_text(measured);
    let profile = profile(measured)?;
    if let Some(out) = out {
        write_whole(out, &text)?;
    }
    if json {
        return output::line(to_json(measured, &profile, out));
    }
    output::text(rates_table(measured))?;
    output::text(models_table(measured))?;
    output::text(links_table(&measured.points, &profile))?;
    match out {
        Some(out) => output::line(format_args!(
            "written to {}; use it with --profile {}",
            out.display(),
            out.display()
        )),
        None => output::line("nothing written; -o FILE writes the profile"),
    }
}

/// A file appears complete or not at all.
fn write_whole(path: &Path, text: &str) -> Outcome<()> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let written = std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written.map_err(|e| {
        let help = "help: --out names a file in a folder that exists and can be written";
        Failure::new(Kind::Resource, format!("{}: {e}\n{help}", path.display()))
    })
}

/// The profile, every number with how it was measured.
fn profile_text(m: &Measurements) -> String {
    let mut text = String::new();
    let (ranks, threads, rates) = (m.ranks, m.threads, &m.rates);
    let how = format!("measured by tpshard calibrate, {ranks} ranks of {threads} threads at once");
    let _ = writeln!(text, "# This machine: {ranks} ranks on {} cores, {threads} threads each", m.cores);
    let _ = writeln!(text, "#\n# quantity = value | where the number comes from\nname = calibrated");
    let mut line = |key: &str, value: f64, source: &str| {
        let _ = writeln!(text, "{key} = {value:.3e} | {source}");
    };
    line("memory_bytes", m.memory_bytes, "measured: MemTotal of /proc/meminfo, divided between the ranks");
    let bytes = format!("{how}: products of one row with 2048 x 2048 f32, 134 MB a step");
    line("memory_bandwidth", rates.bytes_per_second, &bytes);
    line("memory_fraction", 1.0, "measured: the bandwidth is what kernels reached");
    line("compute_fraction", 1.0, "measured: the peaks are what kernels reached");
    line("peak.f64", rates.operations_per_second / 2.0, "estimate: half of f32, vectors hold half as many");
    let peak = format!("{how}: products of 256 x 1024 with 1024 x 1024 f32");
    line("peak.f32", rates.operations_per_second, &peak);
    for other in ["peak.f16", "peak.bf16", "peak.i8"] {
        line(other, rates.operations_per_second, "estimate: computed as f32");
    }
    let launch = format!("{how}: mean of a product of 32 x 32 and a sum, from chains of 8 and 136");
    line("kernel_launch", rates.launch_seconds, &launch);
    let step = format!("{how}: what is left of a step without its kernels");
    line("step_overhead", rates.step_seconds, &step);
    let _ = writeln!(text, "shared_ranks = {ranks} | measured: the ranks that ran at once");
    if let Some(bytes) = shared_cache() {
        let _ = writeln!(text, "cache_bytes = {bytes:.3e} | measured: the largest cache in sysfs");
    }
    for (ranks, families) in &m.kernels {
        for (family, &rates) in families {
            let _ = writeln!(
                text,
                "kernel.{}.{ranks} = {} | measured by tpshard calibrate: {}",
                family.name(),
                print_rates(rates),
                source(m, *family, *ranks),
            );
        }
    }
    let used = m.points.iter().filter(|p| p.carrier == m.carrier);
    let [base, step, bandwidth] = ring(used);
    let carrier = m.carrier.name();
    let _ = writeln!(
        text,
        "protocol.{carrier} = ring base {base:.3e} step {step:.3e} bandwidth {bandwidth:.3e} | measured: least \
         squares of the relative error over everything below, for other numbers of ranks"
    );
    for ((ranks, collective), points) in grouped(&m.points, m.carrier) {
        let (first, last) = (points.first().map_or(0.0, |p| p.0), points.last().map_or(0.0, |p| p.0));
        for (index, line) in lines(&points).iter().enumerate() {
            let Line { up_to, base, seconds_per_byte } = *line;
            let range = if up_to.is_finite() { format!(" up_to {up_to:.3e}") } else { String::new() };
            let _ = writeln!(
                text,
                "protocol.{carrier}.{}.{ranks}.{index} = measured {0} ranks {ranks}{range} base {base:.3e} \
                 bandwidth {1:.3e} | measured by tpshard calibrate: the fastest of {ROUNDS} rounds at {2} sizes from {first} to {last} bytes",
                collective.name(),
                1.0 / seconds_per_byte,
                points.len(),
            );
        }
    }
    text
}

/// What the rates of a family come from.
fn source(m: &Measurements, family: Family, ranks: usize) -> String {
    let factor = m.models.get(&ranks).map(|models| models.factor);
    match (family, factor) {
        (Family::Meeting, _) => format!("least squares over models of {ranks} ranks"),
        (Family::Step, _) | (_, None) => {
            format!("least squares over programs of such kernels, {ranks} ranks at once")
        }
        (_, Some(factor)) => {
            format!(
                "least squares over programs of such kernels, {ranks} ranks at once, times {factor:.3} as in models"
            )
        }
    }
}

/// Models beside what the profile says of them.
fn models_table(m: &Measurements) -> String {
    let mut text = String::new();
    for (ranks, found) in &m.models {
        let _ = writeln!(
            text,
            "models of {ranks} ranks: kernels take {:.3} times what they take alone, ranks wait {:.1} us at a collective",
            found.factor,
            found.meeting * 1e6
        );
        for model in &found.models {
            let said = found.said(model);
            let _ = writeln!(
                text,
                "{:>13.1} us measured{:>13.1} us profile{:>8.0}%  {}",
                model.took * 1e6,
                said * 1e6,
                (said / model.took - 1.0) * 100.0,
                model.name
            );
        }
    }
    text
}

type Sized = Vec<(f64, f64)>;

/// Bytes and seconds by ranks and collective, in the order of sizes.
fn grouped(points: &[Point], carrier: Carrier) -> BTreeMap<(usize, Collective), Sized> {
    let mut groups: BTreeMap<(usize, Collective), Sized> = BTreeMap::new();
    for p in points.iter().filter(|p| p.carrier == carrier) {
        groups.entry((p.ranks, p.collective)).or_default().push((p.bytes, p.seconds));
    }
    groups.values_mut().for_each(|sizes| sizes.sort_by(|a, b| a.0.total_cmp(&b.0)));
    groups
}

fn rates_table(m: &Measurements) -> String {
    let r = &m.rates;
    let mut text = format!("{} ranks of {} threads on {} cores; each rank:\n", m.ranks, m.threads, m.cores);
    for (what, value) in [
        ("matrix products, f32", format!("{:.1} GFLOP/s", r.operations_per_second / 1e9)),
        ("memory", format!("{:.1} GB/s", r.bytes_per_second / 1e9)),
        ("kernel launch", format!("{:.2} us", r.launch_seconds * 1e6)),
        ("step", format!("{:.1} us", r.step_seconds * 1e6)),
    ] {
        let _ = writeln!(text, "  {what:<22}{value:>16}");
    }
    text
}

/// Measured times beside the profile's, with the relative error.
pub(crate) fn links_table(points: &[Point], profile: &Profile) -> String {
    let mut text = format!(
        "{:<16}{:>6}{:>9}{:>11}{:>13}{:>13}{:>9}\n",
        "collective", "ranks", "over", "KiB", "measured us", "profile us", "error"
    );
    let mut worst: BTreeMap<Carrier, (f64, usize, usize)> = BTreeMap::new();
    for p in points {
        let predicted = profile.collective_time(p.collective, p.ranks, p.bytes);
        let error = predicted / p.seconds - 1.0;
        let entry = worst.entry(p.carrier).or_default();
        *entry = (entry.0.max(error.abs()), entry.1 + usize::from(error.abs() <= 0.25), entry.2 + 1);
        let _ = writeln!(
            text,
            "{:<16}{:>6}{:>9}{:>11.0}{:>13.1}{:>13.1}{:>8.0}%",
            p.collective.name(),
            p.ranks,
            p.carrier.name(),
            p.bytes / 1024.0,
            p.seconds * 1e6,
            predicted * 1e6,
            error * 100.0
        );
    }
    for (carrier, (worst, close, all)) in worst {
        let name = carrier.name();
        let _ = writeln!(text, "{name}: {close} of {all} within 25 %, the worst {:.0} % off", worst * 100.0);
    }
    text
}

/// One object per point.
pub(crate) fn links_json(points: &[Point], profile: &Profile) -> Vec<Value> {
    let point = |p: &Point| {
        json!({
            "collective": p.collective.name(),
            "ranks": p.ranks,
            "carrier": p.carrier.name(),
            "bytes": p.bytes,
            "seconds": p.seconds,
            "profile_seconds": profile.collective_time(p.collective, p.ranks, p.bytes),
        })
    };
    points.iter().map(point).collect()
}

/// What the programs took that the rates of kernels come from, and what the rates make of it.
fn kernels_json(m: &Measurements) -> Vec<Value> {
    let all = m.programs.iter().flat_map(|(ranks, programs)| programs.iter().map(move |p| (ranks, p)));
    let program = |(ranks, (family, name, seconds, fitted)): (&usize, &(Family, String, f64, f64))| {
        json!({
            "family": family.name(),
            "program": name,
            "ranks": ranks,
            "seconds": seconds,
            "fitted_seconds": fitted,
        })
    };
    all.map(program).collect()
}

/// What models took, what the sum of their kernels made of it, and what they take by the profile.
fn models_json(m: &Measurements) -> Vec<Value> {
    let all = m.models.iter().flat_map(|(ranks, found)| found.models.iter().map(move |m| (ranks, found, m)));
    let model = |(ranks, found, model): (&usize, &Compared, &Model)| {
        json!({
            "model": model.name,
            "ranks": ranks,
            "seconds": model.took,
            "collectives": model.said.collectives,
            "profile_seconds": found.said(model),
        })
    };
    all.map(model).collect()
}

fn to_json(m: &Measurements, profile: &Profile, out: Option<&Path>) -> Value {
    json!({
        "ranks": m.ranks,
        "threads_per_rank": m.threads,
        "cores": m.cores,
        "operations_per_second": m.rates.operations_per_second,
        "bytes_per_second": m.rates.bytes_per_second,
        "kernel_launch_seconds": m.rates.launch_seconds,
        "step_overhead_seconds": m.rates.step_seconds,
        "kernels": kernels_json(m),
        "models": models_json(m),
        "collectives": links_json(&m.points, profile),
        "profile": profile.text,
        "written": out.map(|o| o.display().to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::super::steps::Rates;
    use super::*;
    use tpshard_ir::DType;

    fn sample() -> Measurements {
        let rates = Rates {
            operations_per_second: 50e9,
            bytes_per_second: 10e9,
            launch_seconds: 1e-6,
            step_seconds: 50e-6,
        };
        let mut points = Vec::new();
        for carrier in [Carrier::Threads, Carrier::Processes] {
            for collective in [Collective::AllReduce, Collective::AllGather] {
                for ranks in [2, 4] {
                    for size in 0..8 {
                        let bytes = f64::from(1024 << (2 * size));
                        points.push(Point { carrier, collective, ranks, bytes, seconds: 5e-6 + bytes / 2e9 });
                    }
                }
            }
        }
        let carrier = Carrier::Processes;
        Measurements {
            ranks: 2,
            threads: 1,
            cores: 2,
            memory_bytes: 4e9,
            rates,
            kernels: BTreeMap::new(),
            programs: BTreeMap::new(),
            models: BTreeMap::new(),
            points,
            carrier,
        }
    }

    #[test]
    fn what_is_written_is_read_as_it_was_measured() {
        let measured = sample();
        let text = profile_text(&measured);
        assert_eq!(text, profile_text(&measured));
        let profile = Profile::parse(&text).unwrap();
        assert_eq!(profile.peak(DType::F32), 50e9);
        assert_eq!(profile.bandwidth(), 10e9);
        assert_eq!(profile.shared_ranks, Some(2));
        for p in &measured.points {
            let seconds = profile.collective_time(p.collective, p.ranks, p.bytes);
            assert!((seconds / p.seconds - 1.0).abs() < 0.01, "{p:?}: {seconds}");
        }
        // Three ranks were not measured, and cost about as much as two and four.
        let three = profile.collective_time(Collective::AllReduce, 3, 1e6);
        assert!(three > 0.0 && three.is_finite());
    }

    #[test]
    fn files_appear_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine.txt");
        write_whole(&path, "a").unwrap();
        write_whole(&path, "b").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "b");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let error = write_whole(&folder.path().join("none/machine.txt"), "a").unwrap_err();
        assert_eq!(error.kind, Kind::Resource);
        assert!(error.message.contains("help: "), "{error}");
    }
}
