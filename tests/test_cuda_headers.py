"""The bindings of the driver, cuBLASLt and cuDNN beside NVIDIA's own headers, where a package or a toolkit has brought them,
and beside cuda-bindings: parameters of every function that is called, and every number that is handed over."""

import ctypes

import pytest
from headers import Header

from jitgrad.codegen import cuda_toolchain
from jitgrad.runtime.cuda import (
    cublaslt,
    cudnn,
    cudnn_attention as attended,
    cudnn_descriptors as parts,
    dlpack,
    driver,
    launch,
    module,
    pinned,
    streams,
)

DRIVER = {
    "SUCCESS": driver.SUCCESS, "ERROR_OUT_OF_MEMORY": driver.OUT_OF_MEMORY, "ERROR_NOT_READY": driver.NOT_READY,
    "ERROR_NO_DEVICE": driver.NO_DEVICE, "ERROR_NO_BINARY_FOR_GPU": module.NO_BINARY_FOR_GPU,
    "ERROR_INVALID_IMAGE": module.INVALID_IMAGE, "ERROR_UNSUPPORTED_PTX_VERSION": module.UNSUPPORTED_PTX,
    "ERROR_NOT_FOUND": module.NOT_FOUND}

RENAMED = {"multi_processor_count": "MULTIPROCESSOR_COUNT",
           "max_threads_per_multi_processor": "MAX_THREADS_PER_MULTIPROCESSOR",
           "shared_memory_per_block": "MAX_SHARED_MEMORY_PER_BLOCK",
           "shared_memory_per_multiprocessor": "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR",
           "shared_memory_per_block_optin": "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
           "regs_per_multiprocessor": "MAX_REGISTERS_PER_MULTIPROCESSOR", "major": "COMPUTE_CAPABILITY_MAJOR",
           "minor": "COMPUTE_CAPABILITY_MINOR", "max_threads": "MAX_THREADS_PER_BLOCK", "shared_bytes": "SHARED_SIZE_BYTES",
           "constant_bytes": "CONST_SIZE_BYTES", "local_bytes": "LOCAL_SIZE_BYTES", "registers": "NUM_REGS",
           "max_dynamic_shared_bytes": "MAX_DYNAMIC_SHARED_SIZE_BYTES"}

NUMBERS = {
    **{f"CUDA_{name}": number for name, number in DRIVER.items()},
    **{f"CU_DEVICE_ATTRIBUTE_{RENAMED.get(name, name.upper())}": number for name, number in driver.ATTRIBUTES.items()},
    **{f"CU_FUNC_ATTRIBUTE_{RENAMED[name]}": number for name, number in module.ATTRIBUTES.items()},
    "CU_STREAM_NON_BLOCKING": streams._NON_BLOCKING, "CU_EVENT_BLOCKING_SYNC": streams._BLOCKING_SYNC,
    "CU_EVENT_DISABLE_TIMING": streams._DISABLE_TIMING, "CU_MEMHOSTALLOC_PORTABLE": pinned._PORTABLE,
    "CU_STREAM_CAPTURE_MODE_RELAXED": launch._RELAXED, "CU_TENSOR_MAP_DATA_TYPE_UINT16": launch._UINT16,
    "CU_TENSOR_MAP_INTERLEAVE_NONE": launch._PLAIN, "CU_TENSOR_MAP_SWIZZLE_128B": launch._SWIZZLE_128,
    "CU_TENSOR_MAP_L2_PROMOTION_L2_256B": launch._PROMOTE_256, "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE": launch._ZEROS,
    "CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL": dlpack._MEMORY_OF, "CU_STREAM_LEGACY": dlpack.LEGACY,
    "CU_TENSOR_MAP_NUM_QWORDS": launch.MAP_BYTES // 8}

_PRODUCT, _LAYOUT, _PREFERENCE = "CUBLASLT_MATMUL_DESC_", "CUBLASLT_MATRIX_LAYOUT_", "CUBLASLT_MATMUL_PREF_"
PRODUCTS = {
    "CUBLAS_COMPUTE_32F": cublaslt._FLOAT, "CUBLAS_COMPUTE_32F_FAST_TF32": cublaslt._TF32,
    "CUBLAS_COMPUTE_64F": cublaslt._DOUBLE, "CUDA_R_32F": cublaslt.TYPES["f32"], "CUDA_R_64F": cublaslt.TYPES["f64"],
    "CUDA_R_16F": cublaslt.TYPES["f16"], "CUDA_R_16BF": cublaslt.TYPES["bf16"],
    f"{_PRODUCT}TRANSA": cublaslt._TURN_LEFT, f"{_PRODUCT}TRANSB": cublaslt._TURN_RIGHT,
    f"{_PRODUCT}EPILOGUE": cublaslt._EPILOGUE, f"{_PRODUCT}BIAS_POINTER": cublaslt._BIAS, "CUBLAS_OP_N": 0, "CUBLAS_OP_T": 1,
    f"{_LAYOUT}BATCH_COUNT": cublaslt._COUNT, f"{_LAYOUT}STRIDED_BATCH_OFFSET": cublaslt._STRIDE,
    f"{_PREFERENCE}MAX_WORKSPACE_BYTES": cublaslt._WORKSPACE, f"{_PREFERENCE}REDUCTION_SCHEME_MASK": cublaslt._REDUCTIONS,
    **{f"{_PREFERENCE}MIN_ALIGNMENT_{side}_BYTES": number
       for side, number in zip("ABCD", cublaslt._ALIGNMENTS, strict=True)},
    "CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE": cublaslt._IN_COMPUTE_TYPE,
    "CUBLASLT_EPILOGUE_DEFAULT": cublaslt._EPILOGUES[""], "CUBLASLT_EPILOGUE_BIAS": cublaslt._ADD_BIAS,
    "CUBLASLT_EPILOGUE_RELU": cublaslt._EPILOGUES["relu"], "CUBLASLT_EPILOGUE_GELU": cublaslt._EPILOGUES["gelu"],
    "CUBLASLT_EPILOGUE_RELU_BIAS": cublaslt._EPILOGUES["relu"] | cublaslt._ADD_BIAS,
    "CUBLASLT_EPILOGUE_GELU_BIAS": cublaslt._EPILOGUES["gelu"] | cublaslt._ADD_BIAS,
    "CUBLAS_STATUS_SUCCESS": cublaslt.SUCCESS, "CUBLAS_STATUS_NOT_SUPPORTED": cublaslt._NOT_SUPPORTED}

_FORWARD, _IN_IMAGE, _IN_WEIGHTS = cudnn.KINDS
_TURNS = ("ALPHA", "BETA", "CONV_DESC")
CONVOLUTIONS = {
    "CUDNN_STATUS_NOT_SUPPORTED": cudnn.NOT_SUPPORTED, "CUDNN_DATA_FLOAT": parts.TYPES["f32"],
    "CUDNN_DATA_HALF": parts.TYPES["f16"], "CUDNN_DATA_BFLOAT16": parts.TYPES["bf16"],
    "CUDNN_CROSS_CORRELATION": cudnn.CROSS_CORRELATION, "CUDNN_HEUR_MODE_A": cudnn.BEST_FIRST,
    "CUDNN_HEUR_MODE_FALLBACK": cudnn.FALLBACK,
    **{f"CUDNN_NUMERICAL_NOTE_{name}": number for name, number in {
        "TENSOR_CORE": cudnn.ON_TENSOR_CORES, "DOWN_CONVERT_INPUTS": cudnn.SHORTER_INPUTS,
        "REDUCED_PRECISION_REDUCTION": cudnn.SHORTER_SUMS, "NONDETERMINISTIC": cudnn.NOT_THE_SAME}.items()},
    **{f"CUDNN_BACKEND_{name}_DESCRIPTOR": number for name, number in {
        "CONVOLUTION": cudnn.CONVOLUTION, "ENGINE": cudnn.ENGINE, "ENGINECFG": cudnn.CONFIGURATION,
        "ENGINEHEUR": cudnn.HEURISTICS, "EXECUTION_PLAN": cudnn.PLAN, "OPERATIONGRAPH": cudnn.GRAPH,
        "VARIANT_PACK": cudnn.OPERANDS, "TENSOR": parts.TENSOR,
        "OPERATION_CONVOLUTION_FORWARD": cudnn.OPERATIONS[_FORWARD],
        "OPERATION_CONVOLUTION_BACKWARD_DATA": cudnn.OPERATIONS[_IN_IMAGE],
        "OPERATION_CONVOLUTION_BACKWARD_FILTER": cudnn.OPERATIONS[_IN_WEIGHTS]}.items()},
    **{f"CUDNN_TYPE_{name}": number for name, number in {
        "HANDLE": parts.HANDLE, "DATA_TYPE": parts.DATA_TYPE, "INT64": parts.INT64, "FLOAT": parts.FLOAT,
        "VOID_PTR": parts.POINTER_TYPE, "CONVOLUTION_MODE": parts.MODE, "HEUR_MODE": parts.HEURISTIC_MODE,
        "NUMERICAL_NOTE": parts.NOTE, "BACKEND_DESCRIPTOR": parts.DESCRIPTOR}.items()},
    **{f"CUDNN_ATTR_{name}": number for name, number in {
        "CONVOLUTION_COMP_TYPE": cudnn._COMPUTED_IN, "CONVOLUTION_CONV_MODE": cudnn._MODE,
        "CONVOLUTION_DILATIONS": cudnn._DILATIONS, "CONVOLUTION_FILTER_STRIDES": cudnn._STRIDES,
        "CONVOLUTION_POST_PADDINGS": cudnn._HIGH, "CONVOLUTION_PRE_PADDINGS": cudnn._LOW,
        "CONVOLUTION_SPATIAL_DIMS": cudnn._AXES, "ENGINEHEUR_MODE": cudnn._HEURISTIC_MODE,
        "ENGINEHEUR_OPERATION_GRAPH": cudnn._ASKED_GRAPH, "ENGINEHEUR_RESULTS": cudnn._RESULTS,
        "ENGINECFG_ENGINE": cudnn._ENGINE, "ENGINE_NUMERICAL_NOTE": cudnn._NOTES,
        "EXECUTION_PLAN_HANDLE": cudnn._HANDLE_OF[cudnn.PLAN], "EXECUTION_PLAN_ENGINE_CONFIG": cudnn._CONFIGURATION,
        "EXECUTION_PLAN_WORKSPACE_SIZE": cudnn._WORKSPACE, "OPERATIONGRAPH_HANDLE": cudnn._HANDLE_OF[cudnn.GRAPH],
        "OPERATIONGRAPH_OPS": cudnn._GRAPH_OPERATIONS, "TENSOR_BYTE_ALIGNMENT": parts._ALIGNMENT,
        "TENSOR_DATA_TYPE": parts._TYPE, "TENSOR_DIMENSIONS": parts._SHAPE, "TENSOR_STRIDES": parts._PITCHES,
        "TENSOR_UNIQUE_ID": parts._NUMBER, "VARIANT_PACK_UNIQUE_IDS": cudnn._NUMBERS,
        "VARIANT_PACK_DATA_POINTERS": cudnn._ADDRESSES, "VARIANT_PACK_WORKSPACE": cudnn._MEMORY,
        **{f"OPERATION_CONVOLUTION_{way}_{part}": number
           for kind, way, parts in ((_FORWARD, "FORWARD", ("X", "W", "Y")), (_IN_IMAGE, "BWD_DATA", ("DX", "W", "DY")),
                                    (_IN_WEIGHTS, "BWD_FILTER", ("X", "DW", "DY")))
           for part, number in zip((*_TURNS, *parts), cudnn._OPERATION[kind], strict=True)}}.items()}}

ATTENTION = {
    **{f"CUDNN_POINTWISE_{name}": number for name, number in {
        "ADD": attended.ADD, "MUL": attended.MUL, "DIV": attended.DIV, "SUB": attended.SUB, "EXP": attended.EXP,
        "LOG": attended.LOG, "CMP_GE": attended.NOT_BELOW, "GEN_INDEX": attended.INDEX,
        "BINARY_SELECT": attended.SELECT}.items()},
    "CUDNN_REDUCE_TENSOR_ADD": attended.SUM, "CUDNN_REDUCE_TENSOR_MAX": attended.MAX,
    **{f"CUDNN_BACKEND_{name}_DESCRIPTOR": number for name, number in {
        "POINTWISE": attended.POINTWISE, "OPERATION_POINTWISE": attended.POINTWISE_OPERATION,
        "MATMUL": attended.PRODUCT, "OPERATION_MATMUL": attended.PRODUCT_OPERATION,
        "REDUCTION": attended.REDUCTION, "OPERATION_REDUCTION": attended.REDUCTION_OPERATION,
        "OPERATION_RESHAPE": attended.RESHAPE_OPERATION}.items()},
    **{f"CUDNN_ATTR_{name}": number for name, number in {
        "POINTWISE_MODE": attended._MODE, "POINTWISE_MATH_PREC": attended._COMPUTED_IN, "POINTWISE_AXIS": attended._AXIS,
        "OPERATION_POINTWISE_PW_DESCRIPTOR": attended._POINTWISE, "OPERATION_POINTWISE_XDESC": attended._X,
        "OPERATION_POINTWISE_BDESC": attended._B, "OPERATION_POINTWISE_YDESC": attended._Y,
        "OPERATION_POINTWISE_TDESC": attended._T, "MATMUL_COMP_TYPE": attended._PRODUCT_COMPUTED_IN,
        "OPERATION_MATMUL_ADESC": attended._PRODUCT_A, "OPERATION_MATMUL_BDESC": attended._PRODUCT_B,
        "OPERATION_MATMUL_CDESC": attended._PRODUCT_C, "OPERATION_MATMUL_DESC": attended._PRODUCT,
        "REDUCTION_OPERATOR": attended._REDUCTION_KIND, "REDUCTION_COMP_TYPE": attended._REDUCTION_COMPUTED_IN,
        "OPERATION_REDUCTION_XDESC": attended._REDUCED_X, "OPERATION_REDUCTION_YDESC": attended._REDUCED_Y,
        "OPERATION_REDUCTION_DESC": attended._REDUCTION, "OPERATION_RESHAPE_XDESC": attended._RESHAPED_X,
        "OPERATION_RESHAPE_YDESC": attended._RESHAPED_Y, "TENSOR_IS_VIRTUAL": parts._IS_VIRTUAL,
        "TENSOR_IS_BY_VALUE": parts._IS_VALUE}.items()}}

HEADERS = {"driver": (("cuda.h",), NUMBERS, driver.PROTOTYPES),
           "cublaslt": (("cublasLt.h", "cublas_api.h", "library_types.h"), PRODUCTS, cublaslt.PROTOTYPES),
           "cudnn": (("cudnn_graph.h", "cudnn_ops.h"), CONVOLUTIONS | ATTENTION, parts.PROTOTYPES),
           "linker": (("nvJitLink.h",), {"NVJITLINK_INPUT_PTX": cuda_toolchain.PTX, "NVJITLINK_SUCCESS": 0}, {})}


@pytest.fixture(params=list(HEADERS))
def described(request):
    """A header, and what our binding says of it."""
    names, *ours = HEADERS[request.param]
    found = Header.find(*names)
    if found is None:
        pytest.skip(f"there is no {names[0]} on this machine")
    return found, *ours


def test_numbers_are_those_of_the_header(described):
    header, numbers, _ = described
    assert {name: header.numbers.get(name) for name in numbers} == numbers


def test_functions_take_what_the_header_says(described):
    header, _, prototypes = described
    for name, types in prototypes.items():
        theirs = header.sizes(name)
        assert len(types) == len(theirs), f"{name} takes {len(theirs)} parameters"
        for k, (ours, (size, pointee)) in enumerate(zip(types, theirs, strict=True)):
            assert ctypes.sizeof(ours) == size, f"parameter {k} of {name} has {size} bytes"
            if None not in (pointee, getattr(ours, "_type_", None)) and not isinstance(ours._type_, str):
                assert ctypes.sizeof(ours._type_) == pointee, f"parameter {k} of {name} points to {pointee} bytes"


def test_numbers_are_those_of_cuda_bindings():
    bindings = pytest.importorskip("cuda.bindings.driver")
    found = {}
    for enumeration in (bindings.CUresult, bindings.CUdevice_attribute, bindings.CUfunction_attribute,
                        bindings.CUstream_flags, bindings.CUevent_flags, bindings.CUstreamCaptureMode,
                        bindings.CUtensorMapDataType, bindings.CUtensorMapInterleave, bindings.CUtensorMapSwizzle,
                        bindings.CUtensorMapL2promotion, bindings.CUtensorMapFloatOOBfill, bindings.CUpointer_attribute):
        found.update({name: int(member) for name, member in enumeration.__members__.items()})
    for name in ("CU_MEMHOSTALLOC_PORTABLE", "CU_STREAM_LEGACY", "CU_TENSOR_MAP_NUM_QWORDS"):
        found[name] = int(getattr(bindings, name, NUMBERS[name]))
    assert {name: found.get(name) for name in NUMBERS} == NUMBERS


def test_what_a_wrong_number_or_parameter_looks_like():
    header = Header("#define CU_A 0x10u\ntypedef enum T_enum { X = 1 << 2, Y, Z = X | 1 } T;\n#define cuF cuF_v2\n"
                    "typedef struct s *H;\nCUresult CUDAAPI cuF(H h, const T kind, size_t *out, char **names);\n"
                    "CUresult CUDAAPI cuF(int old);")
    assert header.numbers == {"CU_A": 16, "X": 4, "Y": 5, "Z": 5}
    assert header.sizes("cuF_v2") == [(8, None), (4, None), (8, 8), (8, 8)]
