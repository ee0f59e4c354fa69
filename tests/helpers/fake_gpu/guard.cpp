// What torch asks a CUDA build for before it runs anything on a device: which device is the current one. There is one.
#include <c10/core/impl/DeviceGuardImplInterface.h>

struct OneDevice : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return {c10::DeviceType::CUDA, 0}; }
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, 0}; }
};
C10_REGISTER_GUARD_IMPL(CUDA, OneDevice)
