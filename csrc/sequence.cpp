// A recorded sequence of operations, run again on other numbers of the same shapes without an interpreter in between.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>

#include <string>
#include <utility>
#include <vector>

namespace stepquant {
namespace {

using at::Tensor;
using c10::IValue;

// What one parameter of a call is: a constant, the value of a slot, or a list of such values.
struct Argument {
  IValue constant;
  std::vector<int64_t> slots;
  bool is_list = false;
  bool is_last = false;  // nobody reads this slot afterwards
};

struct Call {
  c10::OperatorHandle operation;
  std::vector<Argument> arguments;
  std::vector<int64_t> results;  // a slot for each, or -1
  bool is_list = false;  // the results come as one list
};

// Slots 0 to inputs - 1 hold the inputs of a run. Calls are added by `call`, one `push_` per parameter, and `store`.
class Sequence : public torch::CustomClassHolder {
 public:
  explicit Sequence(int64_t inputs) : inputs_(inputs), slots_(inputs) {}

  void call(std::string name, std::string overload) {
    calls_.push_back({c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), {}, {}, false});
  }
  void push_none() { push(IValue()); }
  void push_bool(bool value) { push(value); }
  void push_int(int64_t value) { push(value); }
  void push_float(double value) { push(value); }
  void push_text(std::string value) { push(std::move(value)); }
  void push_device(c10::Device value) { push(value); }
  void push_ints(std::vector<int64_t> value) { push(std::move(value)); }
  void push_floats(std::vector<double> value) { push(std::move(value)); }
  void push_no_numbers() { push(c10::List<std::optional<at::Scalar>>()); }
  void push_tensor(Tensor value) { push(std::move(value)); }
  void push_slot(int64_t slot) { last().arguments.push_back({IValue(), {known(slot)}}); }
  void push_slots(std::vector<int64_t> slots) {
    for (const int64_t slot : slots) known(slot);
    last().arguments.push_back({IValue(), std::move(slots), true});
  }
  void store(std::vector<int64_t> results) {
    const auto& schema = last().operation.schema();
    TORCH_CHECK(last().arguments.size() == schema.arguments().size(), "a call of ", schema.name(), " lacks arguments");
    const auto& returns = schema.returns();
    last().is_list = returns.size() == 1 && returns[0].type()->kind() == c10::TypeKind::ListType;
    TORCH_CHECK(last().is_list || results.size() == returns.size(), schema.name(), " has another number of results");
    for (const int64_t slot : results) slots_ = std::max(slots_, slot + 1);
    last().results = std::move(results);
  }

  // Ends the sequence; its results are these slots.
  void finish(std::vector<int64_t> outputs) {
    for (const int64_t slot : outputs) known(slot);
    outputs_ = std::move(outputs);
    std::vector<bool> read(slots_, false);
    for (const int64_t slot : outputs_) read[slot] = true;
    for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
      for (auto argument = call->arguments.rbegin(); argument != call->arguments.rend(); ++argument) {
        argument->is_last = argument->slots.size() == 1 && !read[argument->slots[0]];
        for (const int64_t slot : argument->slots) read[slot] = true;
      }
    }
  }

  std::vector<Tensor> run(std::vector<Tensor> inputs) {
    TORCH_CHECK(static_cast<int64_t>(inputs.size()) == inputs_, "expected ", inputs_, " inputs, got ", inputs.size());
    const at::AutoDispatchBelowAutograd guard;
    std::vector<IValue> slots(slots_);
    for (int64_t i = 0; i < inputs_; ++i) slots[i] = std::move(inputs[i]);
    torch::jit::Stack stack;
    for (const Call& call : calls_) {
      for (const Argument& argument : call.arguments) push(stack, slots, argument);
      call.operation.callBoxed(stack);
      if (call.is_list) {
        const std::vector<Tensor> list = stack.back().toTensorVector();
        stack.assign(list.begin(), list.end());
      }
      TORCH_CHECK(stack.size() == call.results.size(), call.operation.schema().name(), " left other results");
      for (size_t i = 0; i < call.results.size(); ++i) {
        if (call.results[i] >= 0) slots[call.results[i]] = std::move(stack[i]);
      }
      stack.clear();
    }
    std::vector<Tensor> outputs;
    for (const int64_t slot : outputs_) outputs.push_back(slots[slot].toTensor());
    return outputs;
  }

  int64_t size() const { return static_cast<int64_t>(calls_.size()); }

 private:
  static void push(torch::jit::Stack& stack, std::vector<IValue>& slots, const Argument& argument) {
    if (argument.is_list) {
      c10::List<Tensor> tensors;
      for (const int64_t slot : argument.slots) tensors.push_back(slots[slot].toTensor());
      stack.emplace_back(std::move(tensors));
    } else if (argument.slots.empty()) {
      stack.push_back(argument.constant);
    } else if (argument.is_last) {
      stack.push_back(std::move(slots[argument.slots[0]]));
    } else {
      stack.push_back(slots[argument.slots[0]]);
    }
  }
  void push(IValue value) { last().arguments.push_back({std::move(value), {}}); }
  Call& last() {
    TORCH_CHECK(!calls_.empty(), "no call was begun");
    return calls_.back();
  }
  int64_t known(int64_t slot) const {
    TORCH_CHECK(0 <= slot && slot < slots_, "slot ", slot, " is written by no call before");
    return slot;
  }

  int64_t inputs_;
  int64_t slots_;
  std::vector<Call> calls_;
  std::vector<int64_t> outputs_;
};

// Whether tensors are as they were, by how often each was written to; those of inference mode do not count that.
class Versions : public torch::CustomClassHolder {
 public:
  explicit Versions(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {
    for (const Tensor& tensor : tensors_) versions_.push_back(version(tensor));
  }
  bool same() const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (version(tensors_[i]) != versions_[i]) return false;
    }
    return true;
  }

 private:
  static int64_t version(const Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

  std::vector<Tensor> tensors_;
  std::vector<int64_t> versions_;
};

TORCH_LIBRARY_FRAGMENT(stepquant, library) {
  library.class_<Versions>("Versions").def(torch::init<std::vector<Tensor>>()).def("same", &Versions::same);
  library.class_<Sequence>("Sequence")
      .def(torch::init<int64_t>())
      .def("call", &Sequence::call)
      .def("push_none", &Sequence::push_none)
      .def("push_bool", &Sequence::push_bool)
      .def("push_int", &Sequence::push_int)
      .def("push_float", &Sequence::push_float)
      .def("push_text", &Sequence::push_text)
      .def("push_device", &Sequence::push_device)
      .def("push_ints", &Sequence::push_ints)
      .def("push_floats", &Sequence::push_floats)
      .def("push_no_numbers", &Sequence::push_no_numbers)
      .def("push_tensor", &Sequence::push_tensor)
      .def("push_slot", &Sequence::push_slot)
      .def("push_slots", &Sequence::push_slots)
      .def("store", &Sequence::store)
      .def("finish", &Sequence::finish)
      .def("run", &Sequence::run)
      .def("size", &Sequence::size);
}

}  // namespace
}  // namespace stepquant
