// Runs kernels for every block. Put behind a source; block_emulation.py adds a LAUNCHER for each kernel of it. See block.hpp.

#include <functional>
#include <utility>

static std::function<void()> kernel_call;
static void run_kernel_call() { kernel_call(); }

static void run_all(int blocks, int layers, int threads) {
    gridDim.x = blocks;
    gridDim.y = layers;
    for (blockIdx.x = 0; blockIdx.x < (unsigned)blocks; ++blockIdx.x) {
#ifdef SPLITS
        block::run(threads, run_kernel_call, layers);
#else
        for (blockIdx.y = 0; blockIdx.y < (unsigned)layers; ++blockIdx.y) block::run(threads, run_kernel_call);
#endif
    }
}

template <typename... Types, std::size_t... Places>
static void take_arguments(void (*kernel)(Types...), void** arguments, std::index_sequence<Places...>) {
    kernel_call = [=] { kernel(*(Types*)arguments[Places]...); };
}
template <typename... Types>
static void launch(void (*kernel)(Types...), int blocks, int layers, int threads, void** arguments) {
    take_arguments(kernel, arguments, std::index_sequence_for<Types...>());
    run_all(blocks, layers, threads);
}

// arguments: the place of each value, as cuLaunchKernel takes them.
#define LAUNCHER(kernel)                                                                                \
    extern "C" void launch_##kernel(int blocks, int layers, int threads, void** arguments) {            \
        launch(kernel, blocks, layers, threads, arguments);                                             \
    }
