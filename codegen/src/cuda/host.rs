//! Kernel text as a program for a CPU.

/// What stands before the text.
const SHIM: &str = include_str!("host_shim.h");
/// What stands behind the table of kernels.
const TABLE: &str = include_str!("host_table.h");
/// How the definition of a kernel begins.
const KERNEL: &str = "extern \"C\" __global__ void __launch_bounds__(";

/// Kernel text as C++ for a CPU's compiler (`g++ -std=c++17 -O1 -fPIC -shared`): a library with the function
/// `int tpshard_launch(const char *name, const unsigned grid[3], const unsigned block[3], unsigned shared, void **arguments)`,
/// whose `arguments[i]` points to the `i`-th argument; it is 0 when the kernel has run. A second one,
/// `int tpshard_parameters(const char *name)`, says how many arguments that are, or -1. The text is taken as this crate
/// writes it: one line per kernel that begins its definition.
pub fn host_source(source: &str) -> String {
    let names = source.lines().filter_map(|line| {
        let (_, rest) = line.strip_prefix(KERNEL)?.split_once(") ")?;
        rest.split_once('(').map(|(name, _)| name)
    });
    let table: String = names
        .map(|name| {
            format!("    {{\"{name}\", [](void **arguments) {{ shim::call({name}, arguments); }}, shim::count({name})}},\n")
        })
        .collect();
    format!(
        "{SHIM}{source}\nstatic const shim::Kernel shim_kernels[] = {{\n{table}    {{\"\", nullptr, 0}},\n}};\n{TABLE}"
    )
}
