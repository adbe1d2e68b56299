
// -1: one thread a block, whatever is asked for; else fibers, and the order they take turns in. TPSHARD_SHIM_ORDER says it
// at the start.
static long long shim_order = getenv("TPSHARD_SHIM_ORDER") ? atoll(getenv("TPSHARD_SHIM_ORDER")) : -1;
extern "C" void tpshard_shim_order(long long order) { shim_order = order; }

// Runs a kernel on a grid. 0: done; 1: no such kernel; 2: threads did not meet (the reason goes to standard error).
extern "C" int tpshard_launch(const char *name, const unsigned grid[3], const unsigned block[3], unsigned shared, void **arguments) {
    const shim::Kernel *kernel = nullptr;
    for (const shim::Kernel &k : shim_kernels) if (strcmp(k.name, name) == 0) kernel = &k;
    if (!kernel || !kernel->call || block[1] != 1 || block[2] != 1) return 1;
    shim::entry = kernel->call;
    shim::entry_arguments = arguments;
    shim::block_extent = shim::Dim3{shim_order < 0 ? 1 : block[0], 1, 1};
    shim::grid_extent = shim::Dim3{grid[0], grid[1], grid[2]};
    for (unsigned z = 0; z < grid[2]; z++) for (unsigned y = 0; y < grid[1]; y++) for (unsigned x = 0; x < grid[0]; x++) {
        shim::block_index = shim::Dim3{x, y, z};
        shim::dynamic.assign(shared, 0xff);
        shim::fixed.assign(shim::shared_bytes, 0xff);
        if (shim::block_extent.x == 1) {
            shim::thread_index = shim::Dim3{0, 0, 0};
            kernel->call(arguments);
        } else if (!shim::run_block(shim_order)) {
            fprintf(stderr, "%s: %s\n", name, shim::fault);
            return 2;
        }
    }
    return 0;
}

// How many arguments a kernel takes, none of more than eight bytes; -1 if there is no such kernel.
extern "C" int tpshard_parameters(const char *name) {
    for (const shim::Kernel &k : shim_kernels) if (k.call && strcmp(k.name, name) == 0) return (int)k.parameters;
    return -1;
}
