/* Prints the layout of every struct and the value of every constant that src/lib.rs writes by hand. See record.sh. */
#include <ucp/api/ucp.h>
#include <stddef.h>
#include <stdio.h>

#define SIZE(type) printf("sizeof(%s) %zu\n", #type, sizeof(type))
#define FIELD(type, field) printf("%s.%s %zu\n", #type, #field, offsetof(type, field))
#define VALUE(name) printf("%s %lld\n", #name, (long long)(name))

int main(void)
{
    SIZE(ucs_status_t);
    SIZE(ucp_params_t);
    FIELD(ucp_params_t, field_mask);
    FIELD(ucp_params_t, features);
    FIELD(ucp_params_t, mt_workers_shared);
    FIELD(ucp_params_t, name);
    SIZE(ucp_worker_params_t);
    FIELD(ucp_worker_params_t, field_mask);
    FIELD(ucp_worker_params_t, thread_mode);
    FIELD(ucp_worker_params_t, cpu_mask);
    FIELD(ucp_worker_params_t, events);
    FIELD(ucp_worker_params_t, flags);
    FIELD(ucp_worker_params_t, client_id);
    SIZE(ucp_worker_attr_t);
    FIELD(ucp_worker_attr_t, field_mask);
    FIELD(ucp_worker_attr_t, address_flags);
    FIELD(ucp_worker_attr_t, address);
    FIELD(ucp_worker_attr_t, address_length);
    FIELD(ucp_worker_attr_t, max_debug_string);
    SIZE(ucp_mem_map_params_t);
    FIELD(ucp_mem_map_params_t, field_mask);
    FIELD(ucp_mem_map_params_t, address);
    FIELD(ucp_mem_map_params_t, length);
    FIELD(ucp_mem_map_params_t, flags);
    FIELD(ucp_mem_map_params_t, prot);
    FIELD(ucp_mem_map_params_t, memory_type);
    SIZE(ucp_mem_attr_t);
    FIELD(ucp_mem_attr_t, field_mask);
    FIELD(ucp_mem_attr_t, address);
    FIELD(ucp_mem_attr_t, length);
    FIELD(ucp_mem_attr_t, mem_type);
    SIZE(ucp_ep_params_t);
    FIELD(ucp_ep_params_t, field_mask);
    FIELD(ucp_ep_params_t, address);
    FIELD(ucp_ep_params_t, err_mode);
    FIELD(ucp_ep_params_t, err_handler);
    FIELD(ucp_ep_params_t, err_handler.cb);
    FIELD(ucp_ep_params_t, err_handler.arg);
    FIELD(ucp_ep_params_t, user_data);
    FIELD(ucp_ep_params_t, flags);
    FIELD(ucp_ep_params_t, local_sockaddr);
    SIZE(ucp_request_param_t);
    FIELD(ucp_request_param_t, op_attr_mask);
    FIELD(ucp_request_param_t, flags);
    FIELD(ucp_request_param_t, request);
    FIELD(ucp_request_param_t, cb);
    FIELD(ucp_request_param_t, datatype);
    FIELD(ucp_request_param_t, user_data);
    FIELD(ucp_request_param_t, memory_type);
    FIELD(ucp_request_param_t, memh);
    VALUE(UCS_OK);
    VALUE(UCS_INPROGRESS);
    VALUE(UCS_ERR_LAST);
    VALUE(UCS_LOG_LEVEL_ERROR);
    VALUE(UCS_LOG_LEVEL_WARN);
    VALUE(UCS_LOG_LEVEL_DIAG);
    VALUE(UCS_LOG_LEVEL_INFO);
    VALUE(UCS_LOG_LEVEL_DEBUG);
    VALUE(UCP_PARAM_FIELD_FEATURES);
    VALUE(UCP_FEATURE_RMA);
    VALUE(UCP_FEATURE_WAKEUP);
    VALUE(UCP_WORKER_PARAM_FIELD_THREAD_MODE);
    VALUE(UCP_WORKER_PARAM_FIELD_FLAGS);
    VALUE(UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK);
    VALUE(UCS_THREAD_MODE_SINGLE);
    VALUE(UCP_WORKER_ATTR_FIELD_ADDRESS);
    VALUE(UCP_MEM_MAP_PARAM_FIELD_ADDRESS);
    VALUE(UCP_MEM_MAP_PARAM_FIELD_LENGTH);
    VALUE(UCP_MEM_MAP_PARAM_FIELD_FLAGS);
    VALUE(UCP_MEM_MAP_ALLOCATE);
    VALUE(UCP_MEM_ATTR_FIELD_ADDRESS);
    VALUE(UCP_EP_PARAM_FIELD_REMOTE_ADDRESS);
    VALUE(UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE);
    VALUE(UCP_EP_PARAM_FIELD_ERR_HANDLER);
    VALUE(UCP_ERR_HANDLING_MODE_PEER);
    VALUE(UCP_OP_ATTR_FIELD_FLAGS);
    VALUE(UCP_OP_ATTR_FIELD_MEMH);
    VALUE(UCP_OP_ATTR_FLAG_MULTI_SEND);
    VALUE(UCP_EP_CLOSE_FLAG_FORCE);
    return 0;
}
