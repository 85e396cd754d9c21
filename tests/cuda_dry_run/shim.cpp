// Lets the CPU build of torch make and run autograd graphs of *fake* CUDA tensors: a device guard that does nothing, and
// hooks that say there is one device. Nothing is ever computed. It must be loaded before torch, which asks the hooks once.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
constexpr auto kCuda = c10::DeviceType::CUDA;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kCuda> {
  c10::Stream one() const noexcept { return c10::Stream(c10::Stream::DEFAULT, c10::Device(kCuda, 0)); }
  c10::Device exchangeDevice(c10::Device) const override { return {kCuda, 0}; }
  c10::Device getDevice() const override { return {kCuda, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return one(); }
  c10::Stream getDefaultStream(c10::Device) const override { return one(); }
  c10::Stream getNewStream(c10::Device, int) const override { return one(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return one(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
Guard guard;
c10::impl::DeviceGuardImplRegistrar registrar(kCuda, &guard);

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex current_device() const override { return 0; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
};
}  // namespace
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks) }
